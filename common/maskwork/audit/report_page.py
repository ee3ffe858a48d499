"""A report as one self-contained HTML page: no script, no network, no font, nothing but what is in the file.

Every text goes through `html.escape` on its way in: names and reasons are other people's words. The content security
policy in the page forbids everything but its own style, should anything have been overlooked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from string import Template

from maskwork.audit import plots
from maskwork.audit.report import Claim, JobReport, Left, Member, Outcome, Round
from maskwork.net.names import utc_text

PLOTTED = 4
"""Most statistics that are drawn; all are in the table."""

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p.lead { color: #555; margin: 0 0 1rem; }
.verdict { padding: .8rem 1rem; border-radius: 6px; font-weight: 600; border: 1px solid; }
.verdict.good { background: #eaf6ee; border-color: #2e7d4f; color: #1d5836; }
.verdict.bad { background: #fbeaea; border-color: #c0392b; color: #8e2a20; }
table { border-collapse: collapse; width: 100%; margin: .3rem 0; }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem; border-bottom: 1px solid #e3e3e3; }
th { font-weight: 600; color: #555; font-size: .85rem; }
td.name { white-space: nowrap; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
code { font: .82rem ui-monospace, monospace; overflow-wrap: anywhere; color: #444; }
.mark { font-weight: 700; white-space: nowrap; } .holds { color: #2e7d4f; } .fails { color: #c0392b; }
.unchecked { color: #8a6d00; } .small { color: #666; font-size: .87rem; } ul { margin: .3rem 0; padding-left: 1.2rem; }
.scroll { overflow-x: auto; } svg { margin: .3rem 1rem .3rem 0; }
@media print { body { margin: 0; max-width: none; } h2 { break-after: avoid; } tr, svg { break-inside: avoid; } }
</style>
</head>
<body>
<h1>$title</h1>
<p class="lead">$lead</p>
<div class="verdict $tone">$verdict</div>
$body
</body>
</html>
""")
_MARKS: Mapping[Outcome, str] = {Outcome.HOLDS: "holds", Outcome.FAILS: "fails", Outcome.UNCHECKED: "unchecked"}


def page(report: JobReport) -> str:
    """The page."""
    wrong = [claim for claim in report.claims if claim.outcome is Outcome.FAILS]
    left = [claim for claim in report.claims if claim.outcome is Outcome.UNCHECKED]
    if wrong:
        verdict = f"{len(wrong)} of {len(report.claims)} claims do not hold. See what was found below."
    elif report.problems:
        verdict = "Every claim about this job holds, and something else in the logs does not: see what was found below."
    else:
        verdict = f"{len(report.claims) - len(left)} claims were checked just now, and all of them hold."
        verdict += f" {len(left)} could not be checked." if left else ""
    title = f"Audit report: {report.name}"
    when = utc_text(datetime.fromtimestamp(report.made_at, UTC))
    lead = f"Job {report.job} of the federation {report.federation}. Made {when} from {report.log_records} records."
    sections = (
        _section("What is claimed, and how it was checked", _claims(report.claims)),
        _section("What was found wrong", _list(report.problems)) if report.problems else "",
        _section("To be known besides", _list(report.notes)) if report.notes else "",
        _section("The job", _job(report)),
        _section("Who took part", _members(report.members) + _plots(report.rounds)),
        _section("What left each site", _left(report.left)),
        _section("Under which parameters", "".join(_pairs(p) for p in report.parameters)),
        _section("Rounds and models", _rounds(report.rounds)),
        _section("Attempts that came to nothing", _list(report.failed_attempts)),
        _section("Who asked for what", _list(report.actions)),
        _section("Certificates", _list(report.certificate_events)),
        _section("What no log can show", _list(report.word_only)),
        _section("Which log this is", _pairs({"log of": report.log_owner, "head": report.log_head})),
    )
    return _PAGE.substitute(
        title=escape(title),
        lead=escape(lead),
        verdict=escape(verdict),
        tone="bad" if wrong or report.problems else "good",
        body="\n".join(sections),
    )


def _section(heading: str, content: str) -> str:
    return f"<h2>{escape(heading)}</h2>\n{content}"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; cells are markup already."""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(text: object) -> str:
    return f"<td>{escape(str(text))}</td>"


def _name(text: str) -> str:
    return f'<td class="name">{escape(text)}</td>'


def _number(text: object) -> str:
    return f'<td class="number">{escape(str(text))}</td>'


def _digest(text: str) -> str:
    return f"<td><code>{escape(text)}</code></td>"


def _list(lines: Sequence[str]) -> str:
    if not lines:
        return '<p class="small">none</p>'
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def _pairs(values: Mapping[str, str]) -> str:
    rows = [(f"<th>{escape(name)}</th>", _cell(value)) for name, value in values.items()]
    return f"<table><tbody>{''.join(f'<tr>{a}{b}</tr>' for a, b in rows)}</tbody></table>"


def _claims(claims: Sequence[Claim]) -> str:
    rows = []
    for claim in claims:
        found = f'<div class="small">{escape(claim.found)}</div>' if claim.found else ""
        mark = f'<td class="mark {_MARKS[claim.outcome]}">{escape(claim.outcome.value)}</td>'
        rows.append((mark, f"<td>{escape(claim.claim)}{found}</td>", f'<td class="small">{escape(claim.how)}</td>'))
    return _table(("", "claim", "checked by"), rows)


def _job(report: JobReport) -> str:
    state = f"{report.state}: {report.reason}" if report.reason else report.state
    rows = {
        "task": report.task,
        "submitted by": report.submitted_by,
        "state": state,
        "initial model (SHA-256)": report.initial_model,
        "final model (SHA-256)": report.final_model,
    }
    return _pairs(rows)


def _members(members: Sequence[Member]) -> str:
    rows = []
    for member in members:
        out = f'<div class="small">{"<br>".join(map(escape, member.left_out))}</div>' if member.left_out else "never"
        prints = "<br>".join(f"<code>{escape(f)}</code>" for f in member.fingerprints)
        rows.append(
            (
                _name(member.name),
                _number(member.invited),
                _number(member.survived),
                f"<td>{out}</td>",
                f"<td>{prints}</td>",
            )
        )
    return _table(("site", "asked", "in a sum", "left out", "certificate (SHA-256)"), rows)


def _plots(rounds: Sequence[Round]) -> str:
    if not rounds:
        return ""
    names = [name for name in rounds[-1].statistics if any(name in r.statistics for r in rounds)]
    drawn = [plots.course(rounds, name) for name in names[:PLOTTED]]
    legend = '<p class="small">green: in the sum; red: left out; grey: not asked</p>'
    return f'<div class="scroll">{plots.attendance(rounds)}</div>{legend}<div>{"".join(drawn)}</div>'


def _left(left: Sequence[Left]) -> str:
    rows = []
    for site in left:
        kinds = "<br>".join(f"{escape(kind)}: {size:,} bytes" for kind, size in sorted(site.bytes_by_kind.items()))
        what = f"<td>{kinds or 'nothing'}</td>"
        rows.append((_name(site.site), _number(site.sessions), what, f'<td class="small">{escape(site.source)}</td>'))
    return _table(("site", "sessions", "bytes that left", "according to"), rows)


def _rounds(rounds: Sequence[Round]) -> str:
    rows = []
    for r in rounds:
        statistics = "<br>".join(f"{escape(name)} {value:.6g}" for name, value in r.statistics.items())
        taken = '<div class="small fails">taken back later</div>' if r.rolled_back else ""
        when = utc_text(datetime.fromtimestamp(r.committed_at, UTC))
        rows.append(
            (
                f"<td>{r.round_number}.{r.attempt}{taken}</td>",
                _cell(", ".join(r.survivors)),
                _cell(f"{r.signatures} (t = {r.threshold})"),
                f"<td>{statistics}</td>",
                _digest(r.model_out),
                _cell(when),
            )
        )
    return _table(("round", "survivors", "signed by", "statistics", "model after it (SHA-256)", "committed"), rows)

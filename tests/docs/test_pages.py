"""The pages say what is so: configuration validates, commands exist, links lead somewhere, code runs.

Commands are parsed by the real command line and never executed. TOML blocks name their file in the first line
(``# participant.toml``), which tells the model that must accept them.
"""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pytest
import torch
from pydantic import BaseModel, ValidationError
from safetensors.numpy import load_file

# Typer carries its click inside and gives neither the context nor its exceptions a public name.
from typer._click.core import Command, Context
from typer._click.exceptions import ClickException

from maskwork.cli import build, installed_contributions
from maskwork.coordinator.config import CoordinatorConfig
from maskwork.coordinator.server import DRAIN_S
from maskwork.job import JobFile
from maskwork.participant.config import ParticipantConfig
from maskwork.participant.policy import Policy
from maskwork.participant.tasks.digits import Digits
from maskwork.participant.training import initial_vector, train_once
from maskwork.stopping import STOP_WITHIN_S
from maskwork.task import TrainingConfig, load_task
from maskwork.tensors import write_model

ROOT: Final = Path(__file__).resolve().parents[2]
PAGES: Final = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
README: Final = ROOT / "README.md"
MODELS: Final[dict[str, type[BaseModel]]] = {
    "coordinator.toml": CoordinatorConfig,
    "participant.toml": ParticipantConfig,
    "policy.toml": Policy,
    "job.toml": JobFile,
}
SHELL: Final = ("sh", "bash", "console")
TASK_LINES: Final = 40
TESTS: Final = frozenset(
    name
    for file in (ROOT / "tests").rglob("test_*.py")
    for name in re.findall(r"^(?:async )?def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: where it stands, its language and its text."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    opened: tuple[int, str] | None = None
    lines: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            if opened is None:
                opened, lines = (number, line[3:].strip()), []
            else:
                yield Block(page, *opened, "\n".join(lines) + "\n")
                opened = None
        elif opened is not None:
            lines.append(line)
    assert opened is None, f"{page}:{opened}: a fence is not closed"


BLOCKS: Final = [block for page in PAGES for block in blocks_of(page)]
TOML_BLOCKS: Final = [block for block in BLOCKS if block.language == "toml"]
SHELL_LINES: Final = [
    (block, line)
    for block in BLOCKS
    if block.language in SHELL
    for line in block.text.replace("\\\n", " ").splitlines()
]


def words_of(line: str) -> list[str]:
    words = shlex.split(line.removeprefix("$ "), comments=True)
    return words[: words.index(">")] if ">" in words else words  # what goes into a file is the shell's


def commands(program: str) -> list[tuple[Block, list[str]]]:
    return [(b, words[1:]) for b, line in SHELL_LINES if (words := words_of(line)) and words[0] == program]


def marked(page: Path, mark: str) -> str:
    """The Python block after a comment that begins with `mark`."""
    at = page.read_text(encoding="utf-8").index(f"<!-- {mark}")
    line = page.read_text(encoding="utf-8")[:at].count("\n") + 2
    found = next(block for block in BLOCKS if block.page == page and block.line == line)
    assert found.language == "python"
    return found.text


# --- configuration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", TOML_BLOCKS, ids=str)
def test_a_toml_block_is_one_that_its_reader_accepts(block: Block) -> None:
    name = block.text.split("\n", 1)[0].removeprefix("# ").split()[0]
    assert name in MODELS, f"{block}: the first line of a TOML block names its file"
    MODELS[name].model_validate(tomllib.loads(block.text))


def test_every_kind_of_file_is_shown_and_a_key_too_much_would_be_noticed() -> None:
    assert {b.text.split("\n", 1)[0].removeprefix("# ") for b in TOML_BLOCKS} == set(MODELS)
    for block in TOML_BLOCKS:
        model = MODELS[block.text.split("\n", 1)[0].removeprefix("# ")]
        with pytest.raises(ValidationError, match="no_such_key"):
            model.model_validate({"no_such_key": 1, **tomllib.loads(block.text)})


def test_every_key_is_in_the_reference() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    for name, model in MODELS.items():
        section = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        for key in model.model_fields:
            assert f"| `{key}` |" in section or f"`[{key}" in section, f"{name}: {key}"


# --- commands -------------------------------------------------------------------------------------------------------


def parse(words: Sequence[str]) -> None:
    """Parse a `maskwork` command line to its end; nothing of it runs."""
    command: Command = build(installed_contributions())
    arguments, parent, name = list(words), None, "maskwork"
    while True:
        context: Context = command.make_context(name, arguments, parent=parent)
        resolve = getattr(command, "resolve_command", None)
        if resolve is None:
            return
        _, following, arguments = resolve(context, [*context._protected_args, *context.args])
        command, parent, name = following, context, following.name or ""


@pytest.mark.parametrize(("block", "words"), commands("maskwork"), ids=lambda v: str(v) if isinstance(v, Block) else "")
def test_a_command_exists_with_these_options(block: Block, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for other, exported in commands("export"):
        if other == block:
            for assignment in exported:
                monkeypatch.setenv(*assignment.split("=", 1))
    parse(words)


@pytest.mark.parametrize(
    "words",
    [
        ["job", "submti", "job.toml"],
        ["job", "submit", "job.toml", "--wach", "--coordinator", "a:1", "--identity", "d"],
        ["pki", "issue", "participants", "site-a", "--ca", "ca", "--out", "site-a"],
        ["model", "init", "--task", "digits"],
        ["job", "submit", "job.toml"],
    ],
    ids=["subcommand", "option", "choice", "missing-option", "missing-environment"],
)
def test_a_command_that_does_not_exist_would_be_noticed(words: list[str]) -> None:
    with pytest.raises(ClickException):
        parse(words)


def test_commands_are_found_at_all() -> None:
    assert len(commands("maskwork")) >= 10
    assert len(commands("make")) >= 2


@pytest.mark.parametrize(("block", "words"), commands("make"), ids=lambda v: str(v) if isinstance(v, Block) else "")
def test_a_make_target_exists(block: Block, words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in (word for word in words if "=" not in word):
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), f"{block}: there is no make {target}"


# --- links and names --------------------------------------------------------------------------------------------------


def anchors_of(page: Path) -> set[str]:
    """The anchors that a page's headings get: lower case, punctuation out, spaces as hyphens."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name} links to {target}, which is not there"
        if anchor:
            assert anchor in anchors_of(linked), f"{page.name} links to {target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_test_that_a_page_names_is_there(page: Path) -> None:
    """By its name alone: tests move between files, their names are what a page relies on."""
    for name in re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8")):
        assert name in TESTS, f"{page.name} names {name}"
    for file in re.findall(r"`(tests/[\w/]+(?:\.\w+)?)`", page.read_text(encoding="utf-8")):
        assert (ROOT / file).exists(), f"{page.name} names {file}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_source_file_that_a_page_names_is_there(page: Path) -> None:
    pattern = r"`((?:common|coordinator|participant|protos|scripts|benchmarks)/[\w/.-]+\.\w+)`"
    for file in re.findall(pattern, page.read_text(encoding="utf-8")):
        assert (ROOT / file).exists(), f"{page.name} names {file}"


def test_labels_in_the_protocol_page_are_those_of_the_code() -> None:
    """Every byte string that the core hashes or derives with is on the page, and no other."""
    used: set[str] = set()
    core = ROOT / "common" / "maskwork"
    for file in (*(core / "secagg").glob("*.py"), *(core / "audit").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, bytes) and b"maskwork/v1/" in node.value:
                used.add(node.value.decode().replace("\0", "\\0").lstrip("\\0"))
    page = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
    assert set(re.findall(r'"(maskwork/v1/[^"]*)"', page)) == used


# --- code -----------------------------------------------------------------------------------------------------------


def test_the_readmes_task_trains_a_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = marked(README, "task example")
    assert len(source.splitlines()) < TASK_LINES
    (tmp_path / "readmission.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    numbers = np.random.default_rng(1).normal(size=(50, 10))
    rows = np.column_stack([numbers, numbers[:, 0] > 0])
    np.savetxt(tmp_path / "r.csv", rows, delimiter=",", header=",".join("abcdefghijk"), comments="")

    config = next(
        ParticipantConfig.model_validate(tomllib.loads(block.text))
        for block in TOML_BLOCKS
        if block.page == README and "[tasks.readmission]" in block.text
    )
    site = config.tasks["readmission"]
    assert site.options.keys() == {"csv"}
    researcher = load_task(site.use, {})
    schema, vector = initial_vector(researcher, seed=1)
    assert schema.size == 10 * 32 + 32 + 32 * 2 + 2

    task = load_task(site.use, {"csv": str(tmp_path / "r.csv")})
    task.load_data()
    update, summary = train_once(task, vector, TrainingConfig(), seed=1)
    assert (summary.examples, summary.evaluation_examples) == (40, 10)
    assert summary.train_metrics.keys() == summary.evaluation_metrics.keys() == {"loss", "accuracy"}
    assert np.isfinite(update).all()
    assert np.count_nonzero(update) > update.size // 2


def test_the_readmes_three_lines_load_an_exported_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = marked(README, "loading example")
    assert len(source.strip().splitlines()) == 3
    schema, vector = initial_vector(Digits(), seed=7)
    write_model(tmp_path / "model.safetensors", schema, vector, {"federation": "clinics", "round": "5"})
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(compile(source, "README.md", "exec"), scope)
    model = scope["model"]
    assert isinstance(model, torch.nn.Module)
    written = load_file(tmp_path / "model.safetensors")
    assert model.state_dict().keys() == written.keys()
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), written[name])


def test_the_page_on_failures_says_how_long_a_stop_may_take() -> None:
    stopping = (ROOT / "docs" / "failures.md").read_text().partition("## Stopping")[2]
    assert f"given {DRAIN_S:g} s, then cut off" in stopping
    assert f"The bound is {STOP_WITHIN_S:g} s from the first\nsignal" in stopping
    assert f"within {STOP_WITHIN_S:g} s" in (ROOT / "docker-compose.yml").read_text()
    (given,) = set(re.findall(r"TimeoutStopSec=(\d+)", stopping))
    assert float(given) > STOP_WITHIN_S > DRAIN_S


# --- generated parts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["state_diagrams", "config_reference"])
def test_what_is_generated_is_up_to_date(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [script, "--out", str(tmp_path)])
    runpy.run_path(str(ROOT / "scripts" / f"{script}.py"), run_name="__main__")
    written = sorted(tmp_path.iterdir())
    assert written
    for file in written:
        kept = ROOT / "docs" / file.name
        assert kept.read_bytes() == file.read_bytes(), f"{kept} is out of date: run make docs-check"

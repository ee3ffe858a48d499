"""Writes docs/configuration.md from the models that read the files: keys, types, bounds, defaults and meanings.

A key's meaning is its line under "Attributes:" in the docstring of its model; a key without one is an error, so that
none can be added in silence. Types and bounds come from the models' JSON schema. The examples are written here and
validated by the models before anything is written.

It is NOT where anything is validated at run time, and it holds no default of its own.

Usage: python scripts/config_reference.py [--out docs]
"""

from __future__ import annotations

import argparse
import inspect
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args, get_origin

from pydantic import BaseModel

from maskwork.coordinator.config import CoordinatorConfig
from maskwork.job import JobFile
from maskwork.participant.config import ParticipantConfig
from maskwork.participant.policy import Policy

ROOT = Path(__file__).resolve().parent.parent
Schema = Mapping[str, object]

UNDOCUMENTED = {
    (
        "JobFile",
        "model",
    ): "the initial model, a safetensors file; its header fixes names, shapes and dtypes.",
    ("Deadlines", "advertise_keys_s"): "step 0; the download of the model falls into it.",
    ("Deadlines", "share_keys_s"): "step 1.",
    ("Deadlines", "masked_update_s"): "step 2; local training and the upload fall into it.",
    ("Deadlines", "consistency_check_s"): "step 3.",
    ("Deadlines", "unmask_s"): "step 4.",
    ("Deadlines", "reconnect_s"): "how long a broken connection may stay broken before its site is a dropout.",
}
"""Keys that their model does not describe yet. A line there wins over the one here."""

PATTERNS = {
    r"^[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?$": "name (a-z, 0-9, `.`, `_`, `-`; at most 64 characters)",
    r"^.+:\d{1,5}$": "HOST:PORT",
    r"^(debug|info|warning|error)$": "`debug`, `info`, `warning` or `error`",
    r"^(train|eval)\.[a-z][a-z0-9_]{0,40}$": "`train.NAME` or `eval.NAME`",
}


class Undescribed(RuntimeError):
    """A key that nobody has described, or a shape of schema that this script does not know."""


@dataclass(frozen=True, slots=True)
class File:
    """One configuration file: its name, who reads it, its model and an example."""

    name: str
    reader: str
    model: type[BaseModel]
    example: str


FILES = (
    File(
        "coordinator.toml",
        "`maskwork coordinator run --config coordinator.toml`. Paths are relative to the file.",
        CoordinatorConfig,
        """
# coordinator.toml
listen = "0.0.0.0:8750"
identity = "identity"
state = "/var/lib/maskwork"
""",
    ),
    File(
        "participant.toml",
        "`maskwork participant run --config participant.toml`. Paths are relative to the file.",
        ParticipantConfig,
        """
# participant.toml
coordinator = "coordinator.example.org:8750"
identity = "identity"
state = "/var/lib/maskwork"
policy = "policy.toml"

[tasks.digits]
use = "maskwork.participant.tasks.digits:Digits"
options = { shard = 0, of = 5, alpha = 0.5 }
""",
    ),
    File(
        "policy.toml",
        "the participant, once, when it starts: what this site agrees to, whatever the coordinator asks. Without a "
        "policy file the defaults below hold. [What each key is for](policy.md).",
        Policy,
        """
# policy.toml
tasks = ["digits"]
min_cohort = 5
min_survivors = 4
min_colluders = 2
max_rounds = 200
trusted_organisations = ["university"]
trusted_participants = ["clinic-b"]
min_trusted_survivors = 2

[organisations]
university = ["ward-1", "ward-2"]

[hours]
time_zone = "Europe/Berlin"
windows = ["mon-fri 20:00-06:00", "sat,sun 00:00-24:00"]
""",
    ),
    File(
        "job.toml",
        "`maskwork job submit job.toml`, and again by the coordinator. The path of the model is relative to the file.",
        JobFile,
        """
# job.toml
name = "digits"
task = "digits"
rounds = 20
model = "m.safetensors"

[training]
epochs = 5
learning_rate = 0.05

[cohort]
participants = ["site-a", "site-b", "site-c", "site-d", "site-e"]
min_participants = 4
""",
    ),
)

HEAD = """\
<!-- Written by scripts/config_reference.py from the models that read these files. Change those. -->
# Configuration

Four files, all TOML. A key that is not listed here is refused, and the error names the nearest one that is. "Required"
means that the key has no default; "none" as a default means that the key is absent.
"""


def page() -> str:
    """The whole page."""
    return HEAD + "".join(_section(file) for file in FILES)


def described(model: type[BaseModel]) -> dict[str, str]:
    """The lines under "Attributes:" of a model and of those that it extends, by key."""
    lines: dict[str, str] = {}
    for parent in reversed(model.__mro__):
        if parent is not BaseModel and issubclass(parent, BaseModel):
            lines |= dict(_attributes(inspect.cleandoc(parent.__doc__ or "")))
    return lines


def _attributes(docstring: str) -> Iterator[tuple[str, str]]:
    _, found, rest = docstring.partition("\nAttributes:\n")
    block = re.split(r"\n\n?(?=\S)", rest)[0] if found else ""
    for entry in re.split(r"\n(?=    \S)", "\n" + block):
        key, colon, text = " ".join(entry.split()).partition(": ")
        if colon:
            yield key, text


def _section(file: File) -> str:
    file.model.model_validate(tomllib.loads(file.example))
    schema = file.model.model_json_schema()
    parts = [f"\n## {file.name}\n\nRead by {file.reader}\n\n```toml\n{file.example.strip()}\n```\n"]
    parts += [_table(file.model, schema, schema, None)]
    for heading, model, part in _tables(file.model, schema):
        parts.append(f"\n### {file.name}: `[{heading}]`\n\n{_first_paragraph(model)}\n")
        parts.append(_table(model, part, schema, heading))
    return "".join(parts)


def _first_paragraph(model: type[BaseModel]) -> str:
    return " ".join(inspect.cleandoc(model.__doc__ or "").split("\n\n")[0].split())


def _tables(model: type[BaseModel], schema: Schema) -> Iterator[tuple[str, type[BaseModel], Schema]]:
    """The tables within a file: keys whose value is a model or may be one, or a mapping from names to one."""
    for key, info in model.model_fields.items():
        annotation = info.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield key, annotation, _definition(schema, annotation)
        for argument in get_args(annotation):
            if isinstance(argument, type) and issubclass(argument, BaseModel):
                heading = f"{key}.NAME" if get_origin(annotation) is dict else key
                yield heading, argument, _definition(schema, argument)


def _definition(schema: Schema, model: type[BaseModel]) -> Schema:
    definitions = schema["$defs"]
    assert isinstance(definitions, dict)
    found = definitions[model.__name__]
    assert isinstance(found, dict)
    return found


def _table(model: type[BaseModel], part: Schema, whole: Schema, heading: str | None) -> str:
    texts = described(model)
    properties, required = part["properties"], part.get("required", [])
    assert isinstance(properties, dict)
    assert isinstance(required, list)
    rows = []
    for key in sorted(properties, key=lambda k: k not in required):
        if _is_table(properties[key], whole) and heading is None:
            continue
        text = texts.get(key) or UNDOCUMENTED.get((model.__name__, key))
        if text is None:
            raise Undescribed(f"{model.__name__}.{key} has no line under Attributes: in its model's docstring")
        default = "required" if key in required else _default(properties[key])
        rows.append(f"| `{key}` | {_type(properties[key])} | {default} | {_sentence(text)} |")
    return "\n| key | value | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"


def _is_table(value: Schema, whole: Schema) -> bool:
    inner, options = value.get("additionalProperties"), value.get("anyOf")
    optional = isinstance(options, list) and any("$ref" in option for option in options)
    return "$ref" in value or "allOf" in value or optional or (isinstance(inner, dict) and "$ref" in inner)


def _sentence(text: str) -> str:
    return (text[0].upper() + text[1:]).rstrip(".").replace("|", "\\|") + "."


def _default(value: Schema) -> str:
    if "default" not in value:
        return "empty"
    default = value["default"]
    match default:
        case None:
            return "none"
        case bool():
            return f"`{str(default).lower()}`"
        case dict():
            return "`" + ", ".join(f"{k} = {v}" for k, v in default.items()) + "`"
        case str():
            return f'`"{default}"`'
        case int() | float():
            return f"`{_number(default)}`"
        case _:
            return f"`{default}`"


def _type(value: Schema) -> str:
    options = value.get("anyOf")
    if isinstance(options, list):
        return " or ".join(_type(option) for option in options if option.get("type") != "null")
    if isinstance(choices := value.get("enum"), list):
        return " or ".join(f'`"{choice}"`' for choice in choices)
    if "const" in value:
        return f'`"{value["const"]}"`'
    match value.get("type"):
        case "string" if "pattern" in value:
            pattern = str(value["pattern"])
            if pattern not in PATTERNS:
                raise Undescribed(f"the pattern {pattern} has no words in this script")
            return PATTERNS[pattern]
        case "string":
            return "path" if value.get("format") == "path" else "text"
        case "integer" | "number" as kind:
            return ("whole number" if kind == "integer" else "number") + _bounds(value)
        case "boolean":
            return "`true` or `false`"
        case "array":
            items = value["items"]
            assert isinstance(items, dict)
            return f"list of {_type(items)}"
        case "object":
            return _mapping(value)
        case other:
            raise Undescribed(f"a value of type {other} has no words in this script")


def _mapping(value: Schema) -> str:
    inner = value.get("additionalProperties")
    names = value.get("patternProperties")
    if isinstance(names, dict):
        ((pattern, inner),) = names.items()
        return f"table of {PATTERNS[pattern]} = {_type(inner)}"
    assert isinstance(inner, dict)
    return f"table of NAME = {_type(inner)}"


def _bounds(value: Schema) -> str:
    words = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    found = [f"{sign} {_number(value[key])}" for key, sign in words.items() if key in value]
    return (", " if found else "") + ", ".join(found)


def _number(value: object) -> str:
    assert isinstance(value, int | float)
    for power in (63, 31, 34):
        for offset, sign in ((0, ""), (-1, " - 1")):
            if value == (1 << power) + offset:
                return f"2^{power}{sign}"
    return f"{value:g}".replace("e+0", "e") if isinstance(value, float) else str(value)


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description="writes docs/configuration.md")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="directory to write to")
    (parser.parse_args().out / "configuration.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()

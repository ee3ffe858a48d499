"""Files that people write: TOML, read and checked the same way wherever one is read.

Every key is declared in a `Section`; an unknown one is refused with the nearest known one named. What the keys mean is
said where they are declared: `job`, and the configurations of the coordinator and the participant.
"""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from types import UnionType
from typing import Annotated, ClassVar, Final, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from maskwork.errors import UserError


def _checked_address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or "/" in host or not port.isascii() or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{text!r} is not an address: expected HOST:PORT with a port up to 65535")
    return text


Address = Annotated[str, AfterValidator(_checked_address)]


def _checked_path(path: Path) -> Path:
    if "\0" in str(path):  # no system can open it, and each says so with another error
        raise ValueError("a path cannot hold a NUL character")
    return path


FilePath = Annotated[Path, AfterValidator(_checked_path)]

MAX_FILE_BYTES: Final = 4 << 20
"""Longest file that is read: a job that names 20,000 sites takes less than half of it."""
MAX_PROBLEMS_TOLD: Final = 8
MAX_KEY_SHOWN: Final = 80
_OF_PYDANTIC: Final = "Value error, "
"""What pydantic puts before the text of a check of ours."""


class Section(BaseModel):
    """A table of a configuration file: frozen, no unknown keys, finite numbers."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


S = TypeVar("S", bound=Section)


def read_toml(path: Path, kind: type[S], *, what: str) -> S:
    """Read and check a file.

    Args:
        path: the file.
        kind: what its keys are.
        what: what it should be, for the error: "a job file".

    Raises:
        UserError: unreadable, no TOML, or invalid; the text names the file, the key and what would be accepted.
    """
    try:
        data = tomllib.loads(_bounded_text(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read as {what}: {error.strerror}") from error
    except RecursionError:
        raise UserError(f"{path}: cannot be read as {what}: it is nested too deeply") from None
    except ValueError as error:  # not only TOML's own error: also text that is none, and numbers of 5000 digits
        raise UserError(f"{path}: cannot be read as {what}: {error}") from error
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, kind)}") from error


def check_state_directory(directory: Path, *, file: Path) -> None:
    """Refuse a `state` that is, or lies under, something that is no directory; one that is not there yet is made later.

    Raises:
        UserError: it is; the text names the configuration file and the key.
    """
    try:
        found = next((path for path in (directory, *directory.parents) if path.exists()), directory)
        wrong = found.exists() and not found.is_dir()
    except OSError:
        return  # whoever opens what is in it says what is wrong
    if wrong:
        raise UserError(f"{file}: state: {found} is a file, not a directory. Name a directory for what must last.")


def _bounded_text(path: Path) -> str:
    with path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"it has more than {MAX_FILE_BYTES} bytes")
    return data.decode()


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """A validation error in words: each key with what is wrong, unknown keys with the nearest known one.

    Bounded: whoever sends a file with 100,000 mistakes hears of the first few.
    """
    parts = []
    problems = error.errors(include_url=False, include_input=False)
    for problem in problems[:MAX_PROBLEMS_TOLD]:
        where = ".".join(str(part)[:MAX_KEY_SHOWN] for part in problem["loc"]) or "the file"
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(
                str(problem["loc"][-1])[:MAX_KEY_SHOWN], _known_keys(model, problem["loc"][:-1]), n=1
            )
            parts.append(f"{where}: no such key" + (f"; did you mean {near[0]}?" if near else ""))
        else:
            parts.append(f"{where}: {problem['msg'].removeprefix(_OF_PYDANTIC)}")
    if len(problems) > MAX_PROBLEMS_TOLD:
        parts.append(f"and {len(problems) - MAX_PROBLEMS_TOLD} more")
    return "; ".join(parts)


def _known_keys(model: type[BaseModel], path: tuple[str | int, ...]) -> list[str]:
    named: type[BaseModel] | None = None
    for part in path:
        if named is not None:  # this part is a name that the file's author chose, of a table of such tables
            model, named = named, None
            continue
        field = model.model_fields.get(str(part))
        annotation = None if field is None else field.annotation
        if get_origin(annotation) is UnionType:  # a table that may be absent
            annotation = next((a for a in get_args(annotation) if a is not type(None)), None)
        if get_origin(annotation) is dict:
            annotation = named = get_args(annotation)[1]
            if isinstance(named, type) and issubclass(named, BaseModel):
                continue
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)

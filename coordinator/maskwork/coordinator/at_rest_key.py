"""Where the key comes from that a coordinator's state is encrypted with: a file, an environment variable or a command.

It reads keys and words what is wrong with one; it never shows any part of a key. What is done with them is `vault`'s.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import subprocess
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final, Self

from pydantic import Field, model_validator

from maskwork.coordinator.sealed import KEY_BYTES, MasterKey, MasterKeys
from maskwork.errors import UserError
from maskwork.net.whole_files import read_private
from maskwork.settings import FilePath, Section

COMMAND_TIMEOUT_S: Final = 60.0
_MAX_KEY_FILE_BYTES: Final = 4096
_EXPECTED: Final = (
    f"expected {KEY_BYTES} bytes as 64 hexadecimal digits or as base64: `maskwork coordinator encryption-key"
)

Command = Annotated[tuple[str, ...], Field(min_length=1)]


class Encryption(Section):
    """Encryption at rest; without this table nothing is encrypted. It takes exactly one of the three sources of the
    key, and during a rotation one of the old key's; see at-rest.md.

    Attributes:
        key_file: file with the key, readable by the service's user alone, as `maskwork coordinator encryption-key new`
            writes it.
        key_env: name of the environment variable with the key. The service removes it from its environment once read.
        key_command: program and arguments, without a shell, that print the key.
        old_key_file: as key_file, of the key before this one: what it encrypted can still be read.
        old_key_env: as key_env, of the key before this one.
        old_key_command: as key_command, of the key before this one.
        accept_plain: read what is from before encryption was turned on, until `maskwork coordinator rotate-key` has
            encrypted it.
    """

    key_file: FilePath | None = None
    key_env: str | None = None
    key_command: Command | None = None
    old_key_file: FilePath | None = None
    old_key_env: str | None = None
    old_key_command: Command | None = None
    accept_plain: bool = False

    @property
    def wanted(self) -> bool:
        """Whether a key is named."""
        return bool(_given(self.key_file, self.key_env, self.key_command))

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        named = len(_given(self.key_file, self.key_env, self.key_command))
        if named > 1 or (self.model_fields_set and not named):
            raise ValueError("give exactly one of key_file, key_env and key_command")
        if len(_given(self.old_key_file, self.old_key_env, self.old_key_command)) > 1:
            raise ValueError("give at most one of old_key_file, old_key_env and old_key_command")
        return self

    def relative_to(self, base: Path) -> Encryption:
        """With its paths relative to the file that it was read from."""
        paths = {
            name: base / path for name in ("key_file", "old_key_file") if (path := getattr(self, name)) is not None
        }
        return self.model_copy(update=paths)


def read_keys(settings: Encryption, *, environment: MutableMapping[str, str] = os.environ) -> MasterKeys:
    """Fetch the key, and the old one if there is one to be.

    Raises:
        UserError: One cannot be had, or is not a key; the text says which and where from.
    """
    s = settings
    current = _read("key", s.key_file, s.key_env, s.key_command, environment)
    if not _given(s.old_key_file, s.old_key_env, s.old_key_command):
        return MasterKeys(current)
    old = _read("old_key", s.old_key_file, s.old_key_env, s.old_key_command, environment)
    if old.id == current.id:
        raise UserError("[encryption]: the old key and the key are the same; take the old one out")
    return MasterKeys(current, old)


def parse_key(text: str, *, source: str) -> MasterKey:
    """A key from its text.

    Raises:
        UserError: It is none; the text says where it came from, and nothing of what is there.
    """
    word = text.strip()
    try:
        if re.fullmatch(r"[0-9a-fA-F]{64}", word):
            return MasterKey(bytes.fromhex(word))
        return MasterKey(base64.b64decode(word.replace("-", "+").replace("_", "/"), validate=True))
    except (ValueError, binascii.Error):
        raise UserError(f"{source} does not hold a key: {_EXPECTED} new` makes one") from None


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was just made: its text, which is the secret, and its public id."""

    text: str = field(repr=False)
    id: str


def write_new_key(output: Path | None, *, entropy: Callable[[int], bytes] = os.urandom) -> NewKey:
    """Make a key; with `output`, write it to that new file, for its owner alone to read.

    Raises:
        UserError: There is such a file already, or it cannot be written.
    """
    key = MasterKey(entropy(KEY_BYTES))
    text = base64.b64encode(key.raw).decode()
    if output is not None:
        try:
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "w", encoding="ascii") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(descriptor)
        except FileExistsError:
            raise UserError(
                f"{output} is there already: a key that is overwritten is lost with all it encrypted"
            ) from None
        except OSError as error:
            raise UserError(f"{output} cannot be written: {error.strerror}") from None
    return NewKey(text, key.id.hex())


def _read(
    what: str,
    file: Path | None,
    variable: str | None,
    command: tuple[str, ...] | None,
    environment: MutableMapping[str, str],
) -> MasterKey:
    if file is not None:
        return parse_key(_text_of(file), source=f"[encryption] {what}_file {file}")
    if variable is not None:
        found = environment.pop(variable, None)  # so that no process started from here inherits it
        if found is None:
            raise UserError(f"[encryption] {what}_env: there is no environment variable {variable}")
        return parse_key(found, source=f"[encryption] {what}_env: the environment variable {variable}")
    assert command is not None
    return parse_key(_said_by(what, command), source=f"[encryption] {what}_command: what {command[0]} printed")


def _text_of(file: Path) -> str:
    try:
        return read_private(file, most=_MAX_KEY_FILE_BYTES).decode("ascii", errors="replace")
    except OSError as error:
        raise UserError(
            f"{file}: the key that the state is encrypted with cannot be read ({error.strerror}). Mount or restore it; "
            "a new key does not open what another one has encrypted"
        ) from None


def _said_by(what: str, command: tuple[str, ...]) -> str:
    where = f"[encryption] {what}_command: {command[0]}"
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False, timeout=COMMAND_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{where} gave no key within {COMMAND_TIMEOUT_S:g} s") from None
    except OSError as error:
        raise UserError(f"{where} cannot be run: {error.strerror}") from None
    if done.returncode != 0:
        raise UserError(f"{where} ended with exit code {done.returncode}; what it said is above")
    return done.stdout[:_MAX_KEY_FILE_BYTES].decode("ascii", errors="replace")


def _given(*sources: object) -> list[object]:
    return [source for source in sources if source is not None]

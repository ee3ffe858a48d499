"""Encryption at rest as a whole: look at a state directory before anything in it is touched, and change its key.

`open_vault` is the first thing that a coordinator does with its state: with a key that is missing or wrong it raises,
and nothing was written. `rotate` is `maskwork coordinator rotate-key`: it wraps every data key with the current key and
encrypts what is plain. It can be killed at any instruction and be run again; until it has ended, both keys are needed.

NOT here: the format (`sealed`), and reading keys (`at_rest_key`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from maskwork.coordinator import sealed
from maskwork.coordinator.at_rest_key import Encryption, read_keys
from maskwork.coordinator.config import CoordinatorConfig
from maskwork.coordinator.models import ModelStore, fsync
from maskwork.coordinator.sealed import SealDamaged, SealedWriter, WrongKey
from maskwork.coordinator.store import Store
from maskwork.coordinator.vault import Vault, not_accepted
from maskwork.database import world_failures
from maskwork.errors import StoreError, UserError

_MODELS: Final = "*.safetensors"
_ACCUMULATORS: Final = "*/accumulator"


@dataclass(frozen=True, slots=True)
class Rotated:
    """What `rotate` did: files and rows that got the current key, and files that were plain."""

    rewrapped: int
    encrypted: int
    rows: int
    key_id: bytes


def open_vault(settings: Encryption, *, federation: str, state: Path) -> Vault | None:
    """The vault of a coordinator, once what is in its state directory is known to open with it.

    Raises:
        UserError: A key cannot be had, is not the one that files were encrypted with, or there are plain files where
            encrypted ones are expected, or the reverse. Nothing was touched.
    """
    vault = Vault(federation, read_keys(settings), settings.accept_plain) if settings.wanted else None
    for path in _sealable(state):
        with world_failures(str(path)):
            _check(path, vault)
    return vault


def _check(path: Path, vault: Vault | None) -> None:
    if not sealed.is_sealed(path):
        if vault is not None and not vault.accept_plain:
            raise not_accepted("is not encrypted", path)
        return
    try:
        ids = sealed.key_ids(path)
    except SealDamaged:
        return  # whoever reads it finds that out, and knows what to do about it
    if vault is None and ids:
        raise WrongKey(
            f"is encrypted with the key {ids[0].hex()}, and no encryption is configured",
            file=path,
            remedy="Configure [encryption] with that key; docs/at-rest.md.",
        )
    if vault is not None and ids and not any(vault.keys.by_id(i) for i in ids):
        raise sealed.wrong_key(ids[0], vault.keys, path)


def rotate_state(config: CoordinatorConfig, *, federation: str) -> Rotated:
    """`rotate`, by the configuration of a coordinator that is not running.

    Raises:
        UserError: No encryption is configured; and as `open_vault` and `rotate`.
    """
    if not config.encryption.wanted:
        raise UserError(
            "no encryption is configured: name a key under [encryption]; "
            "`maskwork coordinator encryption-key new` makes one"
        )
    converting = config.encryption.model_copy(update={"accept_plain": True})  # that is what this command is for
    vault = open_vault(converting, federation=federation, state=config.state)
    assert vault is not None
    with Store.open(config.database_url, vault=vault) as store:
        return rotate(vault, store=store, state=config.state)


def rotate(vault: Vault, *, store: Store, state: Path, sync: Callable[[Path], None] = fsync) -> Rotated:
    """See to it that everything opens with the current key alone. Nobody else may have the state open.

    Raises:
        StoreError: Something does not open. What was done until then stays done; it can be run again.
    """
    models = ModelStore(state / "models", fsync=sync, vault=vault)
    models.sweep(store.referenced_models())
    _forget_uploads(state)
    rows = store.reseal()
    rewrapped = encrypted = 0
    for path in _sealable(state):
        with world_failures(str(path)):
            if sealed.is_sealed(path):
                rewrapped += sealed.rewrap(path, _binding(vault, path), vault.keys, fsync=sync)
            else:
                _encrypt(path, vault, models, sync=sync)
                encrypted += 1
    return Rotated(rewrapped, encrypted, rows, vault.keys.current.id)


def _encrypt(path: Path, vault: Vault, models: ModelStore, *, sync: Callable[[Path], None]) -> None:
    if path.name != "accumulator":
        digest = bytes.fromhex(path.stem)
        with path.open("rb") as file, models.incoming(max_bytes=path.stat().st_size) as model:
            for piece in sealed.pieces(file):
                model.write(piece)
            if model.digest_so_far() != digest:
                remedy = "Restore it from a backup, or start the coordinator, which rolls back to an intact one."
                raise StoreError("is damaged: it is not encrypted as it is", file=path, remedy=remedy)
            model.commit()
        return
    following = path.with_name(path.name + ".next")
    with path.open("rb") as file, following.open("w+b", buffering=0) as to:
        writer = SealedWriter(to)
        for piece in sealed.pieces(file):
            writer.write(piece)
        writer.seal(_binding(vault, path), vault.keys.current)
    sync(following)
    following.replace(path)
    sync(path.parent)


def _binding(vault: Vault, path: Path) -> sealed.Binding:
    if path.name == "accumulator":
        return vault.accumulator(bytes.fromhex(path.parent.name))
    return vault.model(bytes.fromhex(path.stem))


def _sealable(state: Path) -> Iterator[Path]:
    """Models and accumulators, as they are found; not what a process that is gone left half-written."""
    yield from sorted(p for p in (state / "models").glob(_MODELS) if _is_hex(p.stem))
    yield from sorted(p for p in (state / "sessions").glob(_ACCUMULATORS) if _is_hex(p.parent.name))


def _is_hex(name: str) -> bool:
    return len(name) == 64 and set(name) <= set("0123456789abcdef")


def _forget_uploads(state: Path) -> None:
    """Uploads of a process that is gone are of no use to the next one, and may be plain."""
    for path in (state / "sessions").glob("*/*"):
        if path.name != "accumulator":
            path.unlink(missing_ok=True)

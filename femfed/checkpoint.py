"""Checkpoints: weights, strategy state and round, written whole or not at all."""

import hashlib
import json
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED

import numpy as np
from numpy.typing import NDArray

Weights = list[NDArray[np.float32]]
State = dict[str, Weights]
ClientStates = dict[int, tuple[int, int]]  # client -> round and CRC-32 of its newest state

KEPT = 2  # the one before the newest is there should the newest be damaged
SPARE = ".spare"  # the file to overwrite


class DamagedError(ValueError):
    """A checkpoint is not what was written."""


@dataclass(frozen=True)
class Checkpoint:
    """A run after one of its rounds.

    Attributes:
        round: the last finished round.
        weights: the global weights.
        state: the strategy's state.
        about: what a resumed run has to agree with, such as the dataset.
        clients: the client states that it counts on; None in one of an earlier femfed.
    """

    round: int
    weights: Weights
    state: State
    about: dict[str, str] = field(default_factory=dict)
    clients: ClientStates | None = None


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write `folder/round_NNNNNN.npz` and let go of all but the newest two.

    The file is written aside, synced and renamed, so that it is whole whenever it is there. It
    overwrites one that was let go: its pages are in memory, and new ones cost more than the rest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(folder, checkpoint.round)
    lists = {
        "weights": checkpoint.weights,
        **{f"state/{k}": v for k, v in checkpoint.state.items()},
    }
    arrays: dict[str, Any] = {
        f"{name}/{i}": array for name, each in lists.items() for i, array in enumerate(each)
    }
    if checkpoint.clients is not None:
        rows = [(client, *of) for client, of in checkpoint.clients.items()]
        arrays["clients"] = np.array(rows, np.int64).reshape(-1, 3)
    lengths = {name: len(each) for name, each in lists.items()}
    known = {"round": checkpoint.round, "lists": lengths, "about": checkpoint.about}
    about = json.dumps(known).encode()
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("r+b" if takes(folder / SPARE, partial) else "wb") as file:
            np.savez(file, allow_pickle=False, about=np.frombuffer(about, np.uint8), **arrays)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    others = [path_of(folder, round) for round in rounds(folder) if round != checkpoint.round]
    for old in others[: -(KEPT - 1)]:
        old.replace(folder / SPARE)
    return path


def takes(spare: Path, partial: Path) -> bool:
    """Move a file that nobody needs to where it is overwritten; return whether there is one.

    Somebody needs one that has other names, as those of a copy made of hard links, or that is not
    to be written to: it loses the name it had here. What a killed process left at `partial` goes.
    """
    partial.unlink(missing_ok=True)
    try:
        spare.rename(partial)
    except FileNotFoundError:  # or another process was sooner
        return False
    status = partial.lstat()
    if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and os.access(partial, os.W_OK):
        return True
    partial.unlink()
    return False


def remove_others(folder: Path) -> None:
    """Remove the file to overwrite, and what killed processes had begun; nobody else's files."""
    for path in [folder / SPARE, *folder.glob(".round_*")]:
        path.unlink(missing_ok=True)


def rounds(folder: Path) -> list[int]:
    """Return the rounds that `folder` has checkpoints of, in order."""
    names = (re.fullmatch(r"round_(\d{6,})\.npz", path.name) for path in folder.glob("round_*"))
    numbers = {int(name[1]) for name in names if name}
    return sorted(number for number in numbers if path_of(folder, number).is_file())


def path_of(folder: Path, round: int) -> Path:
    """Return the file of a round's checkpoint."""
    return folder / f"round_{round:06d}.npz"


def load(path: Path) -> Checkpoint:
    """Read what `save` wrote; npz checks every array against its checksum.

    Raises:
        DamagedError: the file is not what was written.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            if any(part.compress_type != ZIP_STORED for part in arrays.zip.infolist()):
                raise ValueError("it is compressed")  # and might be far larger than the file
            about = json.loads(arrays["about"].tobytes())
            lists = {
                name: [arrays[f"{name}/{i}"] for i in range(length)]
                for name, length in about["lists"].items()
            }
            clients = None
            if "clients" in arrays:
                clients = {client: (at, crc) for client, at, crc in arrays["clients"].tolist()}
        weights = lists.pop("weights")
        state = {name.removeprefix("state/"): each for name, each in lists.items()}
        if path_of(path.parent, about["round"]) != path:
            raise ValueError(f"it is of round {about['round']}")
        if any(array.dtype != np.float32 for array in weights):
            raise ValueError("its weights are not of float32")
        known = {str(name): str(value) for name, value in about["about"].items()}
        if int(known.get("evaluate.every", 1)) < 1:
            raise ValueError("its run was never evaluated")
        return Checkpoint(about["round"], weights, state, known, clients)
    except FileNotFoundError:
        raise
    except Exception as error:  # damage shows as any of a dozen errors, by where it struck
        raise DamagedError(f"checkpoint {path} is damaged: {error!r}") from error


def sha256(weights: Weights) -> str:
    """Return the SHA-256 of all weights in order, as little-endian float32 bytes."""
    digest = hashlib.sha256()
    for layer in weights:
        digest.update(np.ascontiguousarray(layer, "<f4").tobytes())
    return digest.hexdigest()

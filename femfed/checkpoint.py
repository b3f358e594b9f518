"""Checkpoints: weights, strategy state and round, written whole or not at all."""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Weights = list[NDArray[np.float32]]
State = dict[str, Weights]

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
    """

    round: int
    weights: Weights
    state: State
    about: dict[str, str] = field(default_factory=dict)


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
    arrays = {f"{name}/{i}": array for name, each in lists.items() for i, array in enumerate(each)}
    lengths = {name: len(each) for name, each in lists.items()}
    known = {"round": checkpoint.round, "lists": lengths, "about": checkpoint.about}
    about = json.dumps(known).encode()
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        mode = "r+b" if takes(folder / SPARE, partial) else "wb"
        with partial.open(mode) as file:
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
    to be written to: it loses the name it had here.
    """
    try:
        spare.rename(partial)
    except FileNotFoundError:  # or another process was sooner
        return False
    if partial.stat().st_nlink == 1 and os.access(partial, os.W_OK):
        return True
    partial.unlink()
    return False


def remove_others(folder: Path) -> None:
    """Remove the file to overwrite, and what killed processes had begun; nobody else's files."""
    for path in [folder / SPARE, *folder.glob(".round_*")]:
        path.unlink(missing_ok=True)


def rounds(folder: Path) -> list[int]:
    """Return the rounds that `folder` has checkpoints of, in order."""
    return sorted(int(path.stem[6:]) for path in folder.glob("round_*.npz"))


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
            about = json.loads(arrays["about"].tobytes())
            lists = {
                name: [arrays[f"{name}/{i}"] for i in range(length)]
                for name, length in about["lists"].items()
            }
        weights = lists.pop("weights")
        state = {name.removeprefix("state/"): each for name, each in lists.items()}
        return Checkpoint(about["round"], weights, state, about["about"])
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

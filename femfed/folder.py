"""The folder of a run: whose it is, where noise goes, what a refused run leaves, how to go on."""

import contextlib
import fcntl
import os
import shlex
import shutil
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TextIO

from femfed import UserError, terminal


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Keep every other process from running in `folder`."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"another process is running in {folder}; expected a folder of one's own; wait for it "
            "or give another hydra.run.dir"
        ) from None
    try:
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def noise_to(path: Path) -> Iterator[TextIO]:
    """Send what TensorFlow, Ray and their native code print to a file; yield the real stdout."""
    stdout = sys.stdout
    sys.stderr.flush()
    terminal.append(os.dup(2))
    with path.open("a", buffering=1, encoding="utf-8") as file, contextlib.redirect_stdout(file):
        os.dup2(file.fileno(), 2)
        try:
            yield stdout
        finally:
            sys.stderr.flush()
            os.dup2(terminal[-1], 2)
            os.close(terminal.pop())


def discard(folder: Path, before: Collection[str]) -> None:
    """Remove the folder of a new run that was refused.

    Args:
        folder: of the run.
        before: names of what was there before it, which stays.
    """
    if (folder / "rounds.csv").exists():
        return
    for name in {".hydra", "memory", "tensorboard"}.difference(before):
        shutil.rmtree(folder / name, ignore_errors=True)
    if "simulate.log" not in before:
        (folder / "simulate.log").unlink(missing_ok=True)
    for empty in (folder, folder.parent):
        if empty == folder or "outputs" in empty.parts:  # else somebody's own folder
            with contextlib.suppress(OSError):
                empty.rmdir()


def how_to_resume(folder: Path, rounds: int, checkpoint_every: int) -> str:
    """Return the line that says how to go on with the run in `folder`; empty if there is none.

    Imports nothing: a run that is stopped may be importing.

    Args:
        folder: of the run.
        rounds: of the run.
        checkpoint_every: rounds between its checkpoints.
    """
    if not (folder / ".hydra" / "config.yaml").exists():
        return ""
    lost = "no finished round is lost"
    if checkpoint_every > 1:
        kept = [int(path.stem[6:]) for path in (folder / "checkpoint").glob("round_*.npz")]
        lost = f"goes on from round {max((at for at in kept if at < rounds), default=0)}"
    return f"{lost}: python simulate.py resume={shlex.quote(os.path.relpath(folder))}"

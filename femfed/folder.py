"""The folder of a run: whose it is, where noise goes, what a refused run leaves, how to go on."""

import contextlib
import errno
import fcntl
import os
import re
import shlex
import shutil
import stat
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TextIO

from femfed import UserError, terminal

FOLDERS = (".hydra", "checkpoint", "memory", "tensorboard")
TABLES = ("rounds.csv", "clients.csv", "writers.csv", "summary.json")
FILES = (*TABLES, "model.keras", "curves.png", "writers.png", "simulate.log")
BEGUN = {".hydra", "simulate.log"}  # all that a run has until nothing is refused any more
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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


def check_new(folder: Path, key: str) -> list[str]:
    """Return the names in the folder of a new run, which may be left of one that never began.

    Args:
        folder: of the run.
        key: that chooses it, `hydra.run.dir` or `hydra.sweep.dir`.

    Raises:
        UserError: the folder holds a run, or files that are none of a run's.
    """
    names = sorted(path.name for path in folder.iterdir())
    if "rounds.csv" in names or (folder / ".hydra" / "config.yaml").exists():
        raise UserError(
            f"{folder} holds a run already; expected another {key}, or "
            f"resume={folder} to go on with it"
        )
    begun = [folder / name for name in names] + list((folder / ".hydra").glob("*"))
    links = [str(path.relative_to(folder)) for path in begun if not _is_own(path)]
    if others := [name for name in names if name not in BEGUN] + links:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise UserError(
            f"{folder} is not empty: it holds {others[0]!r}{more}; expected a folder of the run's "
            f"own; give another {key}"
        )
    return names


def check_resumed(folder: Path) -> None:
    """Check that all of a run's own files lie in its folder: nothing elsewhere is to be changed.

    A log with other names, as in a copy made of hard links, becomes a file of the run's own; all
    others are replaced and never written to in place.

    Raises:
        UserError: one of them is a link to elsewhere, a pipe or such.
    """
    own = [folder / name for name in (*FOLDERS, *FILES)]
    own += [path for top in FOLDERS if _is_own(folder / top) for path in (folder / top).glob("*")]
    for path in own:
        if not _is_own(path):
            raise UserError(
                f"{path} is a link or no file; expected the files that the run wrote; put what it "
                "points to in its place"
            )
    log = folder / "simulate.log"
    if log.exists() and log.stat().st_nlink > 1:
        copy = folder / f".simulate.log.{os.getpid()}"
        shutil.copyfile(log, copy)
        copy.replace(log)


def _is_own(path: Path) -> bool:
    """Return whether a path is not there, or is a file or a folder itself."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return True
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


def remove_partial_files(folder: Path) -> None:
    """Remove what killed processes had begun in a run's folder; its folders see to their own."""
    begun = re.compile(rf"\.({'|'.join(map(re.escape, FILES))})\.\d+(\.keras)?")
    for path in folder.glob(".*"):
        if begun.fullmatch(path.name):
            path.unlink()
        elif path.name.startswith(".femfed-"):  # shared files that were not yet used
            shutil.rmtree(path, ignore_errors=True)
    (folder / ".hydra" / "config.yaml.new").unlink(missing_ok=True)


def explain(error: OSError, folder: Path) -> tuple[str, str]:
    """Return what an error of the system's means for the run in `folder`, and what to do."""
    elsewhere = "give another folder (hydra.run.dir, cache)"
    if not folder.exists():
        return f"{folder}, the folder of the run, was removed while it ran", "start the run again"
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"{error.filename} was removed while the run needed it", "start the run again"
    if error.errno in NO_ROOM:
        return str(error), f"make room there, or {elsewhere}"
    return str(error), elsewhere


def discard(folder: Path, before: Collection[str]) -> None:
    """Remove the folder of a new run that was refused.

    Args:
        folder: of the run.
        before: names of what was there before it, which stays.
    """
    if _has_a_round(folder):
        return
    for name in {".hydra", "checkpoint", "memory", "tensorboard"}.difference(before):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in {"simulate.log", *TABLES}.difference(before):
        (folder / name).unlink(missing_ok=True)
    for empty in (folder, folder.parent):
        if empty == folder or "outputs" in empty.parts:  # else somebody's own folder
            with contextlib.suppress(OSError):
                empty.rmdir()


def _has_a_round(folder: Path) -> bool:
    """Return whether a run has finished a round of training: its table has more than round 0."""
    try:
        with (folder / "rounds.csv").open("rb") as table:
            return any(line[:1].isdigit() and not line.startswith(b"0,") for line in table)
    except OSError:
        return False


def how_to_resume(folder: Path, rounds: int, checkpoint_every: int) -> str:
    """Return the line that says how to go on with the run in `folder`; empty before a round.

    Imports nothing: a run that is stopped may be importing.

    Args:
        folder: of the run.
        rounds: of the run.
        checkpoint_every: rounds between its checkpoints.
    """
    if not (folder / ".hydra" / "config.yaml").exists() or not _has_a_round(folder):
        return ""
    lost = "no finished round is lost"
    if checkpoint_every > 1:
        names = [path.stem[6:] for path in (folder / "checkpoint").glob("round_*.npz")]
        kept = [int(name) for name in names if name.isdecimal()]
        lost = f"goes on from round {max((at for at in kept if at < rounds), default=0)}"
    return f"{lost}: python simulate.py resume={shlex.quote(os.path.relpath(folder))}"

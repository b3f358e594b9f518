"""The folder of a run: whose it is, where libraries' noise goes, what a refused run leaves."""

import contextlib
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from femfed import UserError


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
    terminal = os.dup(2)
    with path.open("a", buffering=1) as file, contextlib.redirect_stdout(file):
        os.dup2(file.fileno(), 2)
        try:
            yield stdout
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)


def discard(folder: Path) -> None:
    """Remove the folder of a run that was refused; what is not of that run stays."""
    if (folder / "rounds.csv").exists():
        return
    shutil.rmtree(folder / ".hydra", ignore_errors=True)
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    (folder / "simulate.log").unlink(missing_ok=True)
    for empty in (folder, folder.parent):
        if empty == folder or "outputs" in empty.parts:  # else somebody's own folder
            with contextlib.suppress(OSError):
                empty.rmdir()

"""Folders that do not outlive their process, however it ends."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from femfed import cleaned_up

LOCK = "lock"  # file that a process keeps locked in its folder


class OwnedFolder:
    """A new folder of this process; those that dead processes left beside it are removed.

    Args:
        place: where to make it.
        prefix: of its name, by which those of other processes are known.
    """

    def __init__(self, place: Path, prefix: str) -> None:
        remove_abandoned(place, prefix)
        hidden = Path(tempfile.mkdtemp(prefix=f".{prefix}", dir=place))
        try:
            self._lock = (hidden / LOCK).open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX)  # before the folder has a name to look for
            self.path = hidden.rename(place / hidden.name.removeprefix("."))
        except BaseException:
            shutil.rmtree(hidden, ignore_errors=True)
            raise
        self._removed = contextlib.ExitStack()

    def __enter__(self) -> "OwnedFolder":
        self._removed.enter_context(cleaned_up(self._remove))
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._removed.close()
        finally:
            self._lock.close()

    def _remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def remove_abandoned(place: Path, prefix: str) -> None:
    """Remove the folders of dead processes in `place`; those of other users stay."""
    for folder in place.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            if folder.lstat().st_uid != os.getuid() or folder.is_symlink():
                continue
        with contextlib.suppress(OSError), (folder / LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails if a live process holds it
            shutil.rmtree(folder, ignore_errors=True)

"""femfed: federated learning on FEMNIST writers, simulated on one machine."""

import contextlib
import ctypes
import errno
import gc
import io
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

__version__ = "0.1.0"

# Set before TensorFlow, Ray or Flower is imported, here and (by inheritance) in every worker.
# One TensorFlow thread per process is part of the mathematics: two threads add in another order.
ENVIRONMENT = {
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",  # of NumPy: distances, sums of squares
    "MKL_NUM_THREADS": "1",  # of a NumPy that has it in place of OpenBLAS
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TF_FORCE_GPU_ALLOW_GROWTH": "true",
    "KERAS_BACKEND": "tensorflow",
    "KERAS_HOME": os.devnull,  # no folder: ~/.keras/keras.json could change the type of weights
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
# A user's settings of these libraries, made for other programs, would change weights or end a run.
# Those of Ray go in `engine.ray`: Ray gives its workers some.
LIBRARIES = (
    *("DNNL_", "FLWR_", "GOTO_", "HYDRA_", "KERAS_", "MKL_", "NPY_", "NUMBA_", "NUMPY_", "ONEDNN_"),
    *("OPENBLAS_", "PROTOCOL_BUFFERS_", "TF_", "XLA_"),
)


def drop_settings(prefixes: tuple[str, ...]) -> None:
    """Remove environment variables that begin with one of `prefixes`, but for our own."""
    for name in list(os.environ):
        if name.startswith(prefixes) and name not in ENVIRONMENT:
            del os.environ[name]


drop_settings(LIBRARIES)
os.environ.update(ENVIRONMENT)
if os.environ.pop("PYTHONWARNINGS", None):  # as errors, they would end the imports of libraries
    warnings.resetwarnings()
    for _kind in (DeprecationWarning, ImportWarning, PendingDeprecationWarning, ResourceWarning):
        warnings.simplefilter("ignore", _kind)  # Python's own choice


PICTURES_AND_TABLES = ("matplotlib", "pandas", "PIL")  # imported with Keras where they are there

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's numbers of them
_AGAIN = 0.2  # seconds
terminal = [2]  # the descriptor of stderr, wherever noise is redirected
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # signals that stop a run
_received: list[int] = []  # those of them that came
_cleanups: list[Callable[[], object]] = []  # of blocks that have begun


@contextlib.contextmanager
def light_imports(without: Sequence[str]) -> Iterator[None]:
    """Have libraries imported in the block find some others not installed, if not yet imported.

    For what they import where it is there, and what is of no use here: it takes seconds. Garbage is
    not collected meanwhile, which takes a quarter of the time: what is imported stays.

    Args:
        without: modules.
    """
    absent = [name for name in without if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
        for name in absent:
            del sys.modules[name]


def keep_freed_memory() -> None:
    """Have this process use memory again that is free, rather than give it back to the system.

    To ask for it anew at the next client or round costs more than to copy weights there. Where the
    C library is another than glibc, nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, 2**30)
        mallopt(_MMAP_THRESHOLD, 2**25)  # fixed by the line before; glibc's largest


NAME_CHARACTERS = 80  # of a name that is shown
_TAG = re.compile(r"\[[A-Za-z/#@]")  # rich reads what follows as a style


def printable(name: object, most: int = NAME_CHARACTERS) -> str:
    r"""Return a name from data, or one that a user typed, as one line of harmless characters.

    Newlines, terminal escapes, NUL, marks that turn the direction of writing and halves of
    characters are written as in a Python string: `\n`, `\x1b`, `\x00`, `\u202e`, `\udc80`. A
    backslash is doubled, and the bracket of `[red]` is `\x5b`. Three dots stand for the middle of a
    longer name.

    Args:
        name: such as a writer's; anything but a string is converted to one.
        most: characters to return at most, 12 or more.
    """
    text = str(name)
    pieces = [_printable_at(text, place) for place in range(min(most, len(text)))]
    if len(text) <= most and sum(map(len, pieces)) <= most:
        return "".join(pieces) or "''"
    head, tail = "", ""
    for piece in pieces:
        if len(head) + len(piece) > (most - 3) * 2 // 3:
            break
        head += piece
    for at in range(len(text) - 1, -1, -1):
        piece = _printable_at(text, at)
        if len(head) + 3 + len(piece) + len(tail) > most:
            break
        tail = piece + tail
    return f"{head}...{tail}"


def one_line(message: str) -> str:
    """Return a message as one line; characters that a terminal would obey are escaped."""
    return "".join(map(_escaped, message))


def print_quietly(text: str) -> None:
    """Print what a command is for, and end quietly if a reader like `head` has gone.

    Raises:
        UserError: standard output takes no more.
    """
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the exit fails as well
        if not isinstance(error, BrokenPipeError):
            raise UserError(f"cannot write to standard output: {error.strerror}") from None


def _printable_at(text: str, place: int) -> str:
    if text[place] == "\\" or _TAG.match(text, place):
        return {"\\": "\\\\", "[": "\\x5b"}[text[place]]
    return _escaped(text[place])


def _escaped(char: str) -> str:
    return char if char.isprintable() else char.encode("unicode_escape").decode()


def escape_unencodable() -> None:
    """Have stdout and stderr escape characters that their encoding lacks, rather than fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class _Output(io.FileIO):
    """A stream whose reader may go, as `head` does or a lost terminal: the rest is dropped."""

    def write(self, data: Any) -> int:
        """Write as a file does."""
        try:
            return super().write(data) or 0
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(data)


def go_on_without_readers() -> None:
    """Drop what is printed to stdout and stderr once they have no reader, rather than fail."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed when Python started
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__"):  # else a test or a notebook reads it
            output = _Output(stream.fileno(), "w", closefd=False)
            text = io.TextIOWrapper(
                io.BufferedWriter(output),
                encoding=stream.encoding,
                errors=stream.errors,
                line_buffering=True,
            )
            setattr(sys, name, text)


class UserError(ValueError):
    """A mistake the user can mend: what happened, what was expected, how to fix it, in one line.

    `simulate.py` prints it without a traceback and exits with code 2.
    """


class RunError(RuntimeError):
    """The run cannot go on, and says why in a line; `simulate.py` exits with code 1."""


class EngineError(RunError):
    """Ray does not start, or its servers have ended: this process can run nothing with Ray more."""


class Stopped(BaseException):  # no Exception: a sweep stops as a whole
    """The run was stopped by a signal.

    Attributes:
        signal: its number.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal


def stop(number: int) -> None:
    """Raise `Stopped`, as the answer to a signal, until it is on its way.

    A signal comes at any moment, within a finalizer or a weakref's callback too, and Python drops
    what is raised there. So it is raised anew every `_AGAIN` seconds, but where one is handled.

    Args:
        number: of the signal.

    Raises:
        Stopped: none is being handled.
    """
    signal.signal(signal.SIGALRM, lambda *_: stop(number))
    signal.setitimer(signal.ITIMER_REAL, _AGAIN)
    handled = sys.exc_info()[1]
    while handled is not None:
        if isinstance(handled, Stopped):
            return
        handled = handled.__context__
    raise Stopped(number)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Raise `Stopped` in the block at the first signal of `STOPPING`; end at once at the second.

    A SIGHUP that is ignored when the block begins, as below `nohup`, stays ignored.
    """
    if signal.getsignal(signal.SIGTERM) is _on_signal:  # a block around this one does it
        yield
        return
    _received.clear()
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    handled = [number for number in STOPPING if number != signal.SIGHUP or not ignored]
    before = {number: signal.signal(number, _on_signal) for number in handled}
    try:
        yield
    finally:
        if not _received:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def cleaned_up(cleanup: Callable[[], object]) -> Iterator[None]:
    """Run a cleanup after the block, and before a second signal ends the process in it.

    Args:
        cleanup: may be called again before it has ended.
    """
    _cleanups.append(cleanup)
    try:
        yield
    finally:
        outlast(cleanup)
        _cleanups.remove(cleanup)


def _on_signal(number: int, frame: FrameType | None) -> None:
    if _received:
        signal.setitimer(signal.ITIMER_REAL, 0)  # no other `Stopped` in between
        for cleanup in reversed(_cleanups):
            with contextlib.suppress(Exception):
                cleanup()
        os._exit(128 + number)
    _received.append(number)
    stop(number)


def outlast(cleanup: Callable[[], object]) -> None:
    """Run a cleanup to its end: if `Stopped` comes in between, anew, since it comes only once."""
    try:
        cleanup()
    except Stopped:
        cleanup()
        raise

"""One virtual environment per peer, made once from its requirements."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).parent / "requirements"
PYTHON = (3, 11)  # the one that every peer runs on


class NotInstalledError(Exception):
    """An environment cannot be made; says why."""


def environment(folder: Path, name: str) -> Path:
    """Return the Python of the environment `folder`/`name`, made or made anew where need be.

    It holds `requirements/NAME.txt`, and what `requirements/NAME.no_deps.txt` lists without its
    dependencies, for a package whose own wishes cannot be met. pip's output is in `NAME.log`.

    Raises:
        NotInstalledError: no such Python, or pip failed.
    """
    home = folder / name
    files = [REQUIREMENTS / f"{name}.txt", REQUIREMENTS / f"{name}.no_deps.txt"]
    wanted = "".join(file.read_text() for file in files if file.exists())
    python, made_of = home / "bin" / "python", home / "requirements.txt"
    if made_of.exists() and made_of.read_text() == wanted:
        return python
    base = interpreter()
    print(f"making the environment {home}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    commands = [[base, "-m", "venv", "--clear", str(home)]]
    for file, options in zip(files, ([], ["--no-deps"]), strict=True):
        if file.exists():
            commands.append([str(python), "-m", "pip", "install", *options, "-r", str(file)])
    with (folder / f"{name}.log").open("w+") as log:
        for command in commands:
            if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode:
                log.seek(0)
                lines = [line.strip() for line in log if line.strip()]
                errors = [line for line in lines if line.startswith("ERROR")]
                raise NotInstalledError((errors or lines or ["no output"])[-1])
    made_of.write_text(wanted)
    return python


def interpreter() -> str:
    """Return a Python of the version that the peers need: this one, on PATH, or pyenv's."""
    name = "python{}.{}".format(*PYTHON)
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = sorted(map(str, pyenv.glob("versions/{}.{}.*/bin/python".format(*PYTHON))))
    for candidate in (sys.executable, shutil.which(name), *found):
        if candidate and _version(candidate) == PYTHON:
            return candidate
    raise NotInstalledError(f"no {name} on PATH or among pyenv's")


def _version(python: str) -> tuple[int, ...]:
    code = "import sys; print(*sys.version_info[:2])"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return tuple(map(int, done.stdout.split()))

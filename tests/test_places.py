"""Places that cannot be written to: a run does without them, or names path and key in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RUN = (
    *("rounds=1", "clients=4", "clients_per_round=2", "dataset.writers=6", "model=logistic"),
    "engine.workers=1",
)
# A namespace of one's own, in which a place is made read-only or is taken away.
NAMESPACE = ["unshare", "--map-root-user", "--mount"]
READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && cd "$0" && exec "$@"'
READ_ONLY_SHM = 'mount -t tmpfs -o ro tmpfs /dev/shm && exec "$@"'
NO_SHM = """
mkdir "$0/dev" && mount -t tmpfs tmpfs "$0/dev"
for name in null zero random urandom; do
    touch "$0/dev/$name" && mount --bind "/dev/$name" "$0/dev/$name"
done
mount --rbind "$0/dev" /dev && test ! -e /dev/shm && exec "$@"
"""


def typed(how: str, place: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Type a Python command in a namespace that `how` has set up."""
    return subprocess.run(
        [*NAMESPACE, "sh", "-ec", how, str(place), sys.executable, *command],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module", autouse=True)
def namespaces(tmp_path_factory: pytest.TempPathFactory) -> None:
    place = tmp_path_factory.mktemp("namespaces")
    for how in (READ_ONLY, READ_ONLY_SHM, NO_SHM):
        done = typed(how, place, "-c", "")
        if done.returncode:
            pytest.skip(f"no namespace with mounts of its own here: {done.stderr.strip()}")


@pytest.fixture(scope="module")
def sha256(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("with")
    return hash_of(folder, 'exec "$@"', "inline")


def hash_of(folder: Path, how: str, engine: str) -> str:
    paths = [f"cache={folder}/cache", f"hydra.run.dir={folder}/run"]
    done = typed(how, folder, str(ROOT / "simulate.py"), *RUN, *paths, f"engine={engine}")
    assert (done.returncode, done.stderr) == (0, "")
    return str(json.loads((folder / "run" / "summary.json").read_text())["weights_sha256"])


@pytest.mark.parametrize(
    ("how", "engine"),
    [(NO_SHM, "inline"), (NO_SHM, "ray"), (READ_ONLY_SHM, "ray")],
    ids=["absent-inline", "absent-ray", "read-only-ray"],
)
def test_a_run_does_without_shared_memory(
    how: str, engine: str, sha256: str, tmp_path: Path
) -> None:
    assert hash_of(tmp_path, how, engine) == sha256
    assert list((tmp_path / "run" / "tensorboard").iterdir())


@pytest.mark.parametrize(
    ("command", "path", "advice"),
    [
        (("simulate.py", "engine=inline"), "outputs", "hydra.run.dir=DIR"),
        (("simulate.py", "-m", "engine=inline", "seed=0,1"), "outputs", "hydra.sweep.dir=DIR"),
        (("simulate.py", "engine=inline", "hydra.run.dir=here"), "here", "hydra.run.dir"),
        (("-m", "femfed.data"), "outputs", "work in a folder of yours"),
        (("-m", "femfed.data", "cache=here"), "here", "cache=DIR"),
    ],
    ids=["run", "sweep", "given", "data", "cache"],
)
def test_a_read_only_working_folder_is_a_line(
    command: tuple[str, ...], path: str, advice: str, tmp_path: Path, cache: Path
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    if command[0] == "simulate.py":
        command = (str(ROOT / "simulate.py"), *command[1:])
    if "cache=here" not in command:
        command = (*command, f"cache={cache}")

    done = typed(READ_ONLY, place, *command, *RUN)

    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert f"{place}/{path}" in line
    assert "Read-only file system" in line
    assert advice in line


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")

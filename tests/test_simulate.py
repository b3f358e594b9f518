"""The command as a user types it: what it prints, what it leaves, how it refuses."""

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.handwriting import REAL_DATA, needs_real_data

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    "clients=4",
    "clients_per_round=2",
    "rounds=2",
    "evaluate.unseen_fraction=0.34",
    "dataset.writers=6",
    "model=logistic",
]


def run(folder: Path, *overrides: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Type `python simulate.py`, with everything written below `folder`."""
    command = [sys.executable, "-W", "error::SyntaxWarning", str(ROOT / "simulate.py"), *overrides]
    command += [f"hydra.run.dir={folder}/run", f"hydra.sweep.dir={folder}"]
    if not any(override.startswith("cache=") for override in overrides):
        command.append(f"cache={folder}/cache")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str, str]:
    """One run with the default model and dropout on the default engine."""
    folder = tmp_path_factory.mktemp("finished")
    done = run(folder, *TINY[:-1], "model=cnn", "engine.workers=2", "list_clients=true")
    return folder, done.stdout, done.stderr


def test_a_pipe_gets_plain_lines_and_no_noise(finished) -> None:
    _, stdout, stderr = finished
    lines = stdout.splitlines()
    assert stderr == ""
    assert "synthetic" in lines[0]
    assert sum(line.startswith("round ") for line in lines) == 3
    assert sum("number : 0, subject number : " in line for line in lines) == 4
    assert lines[-1].startswith("results in ")
    assert "\x1b" not in stdout


def test_a_run_leaves_what_it_should(finished) -> None:
    folder = finished[0] / "run"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        ".hydra", "rounds.csv", "clients.csv", "writers.csv", "summary.json", "model.keras",
        "checkpoint", "tensorboard", "curves.png", "writers.png", "simulate.log",
    }  # fmt: skip
    about = summary(folder)
    assert about["dataset"] == "glyphs (synthetic)"
    assert (about["clients"], about["clients_per_round"], about["rounds"]) == (4, 2, 2)
    assert set(about["seconds"]) == {"total", "startup", "train", "evaluate", "overhead"}
    assert all(value >= 0 for value in about["seconds"].values())
    assert len(about["weights_sha256"]) == 64
    assert [row["round"] for row in rows(folder / "rounds.csv")] == ["0", "1", "2"]
    clients = rows(folder / "clients.csv")
    assert [row["round"] for row in clients] == ["1", "1", "2", "2"]
    assert {row["number"] for row in clients} == {"0"}
    assert [row["role"] for row in rows(folder / "writers.csv")] == ["seen"] * 4 + ["unseen"] * 2


def test_model_keras_gives_the_stated_accuracy_in_plain_keras(finished) -> None:
    import keras

    from femfed.data.store import WriterStore

    folder = finished[0]
    (store_folder,) = [p for p in (folder / "cache").iterdir() if p.name.startswith("glyphs")]
    store = WriterStore.open(store_folder)
    names = {row["writer"] for row in rows(folder / "run" / "writers.csv") if row["role"] == "seen"}
    writers = [store.writer(i, 0.1, 0) for i in range(len(store)) if store.names[i] in names]
    images = np.concatenate([writer.images[writer.test] for writer in writers])
    labels = np.concatenate([writer.labels[writer.test] for writer in writers])
    model = keras.saving.load_model(folder / "run" / "model.keras", compile=False)
    logits = model.predict(images[..., None].astype("float32") / 255, verbose=0)
    accuracy = float(np.mean(np.argmax(logits, -1) == labels))
    assert len(writers) == 4
    assert accuracy == pytest.approx(summary(folder / "run")["test_accuracy"], abs=1e-9)


def test_same_bits_inline_and_with_one_or_two_workers(finished, tmp_path: Path) -> None:
    expected = summary(finished[0] / "run")["weights_sha256"]
    cnn = [*TINY[:-1], "model=cnn"]
    settings = {
        "inline": ["engine=inline"],
        "one": ["engine.workers=1"],
        "one_message_a_client": ["engine.workers=2", "engine.bundle=1", "engine.wire=value"],
    }
    found = {}
    for name, overrides in settings.items():
        run(tmp_path / name, *cnn, *overrides)
        found[name] = summary(tmp_path / name / "run")["weights_sha256"]
    assert found == dict.fromkeys(settings, expected)


def test_a_sweep_leaves_one_folder_a_run(tmp_path: Path) -> None:
    run(tmp_path, "-m", *TINY, "engine=inline", "strategy=fedavg,fedprox", "seed=0,1")
    summaries = [summary(path.parent) for path in tmp_path.glob("*/summary.json")]
    assert sorted((s["strategy"], s["seed"]) for s in summaries) == [
        ("fedavg", 0), ("fedavg", 1), ("fedprox", 0), ("fedprox", 1),
    ]  # fmt: skip
    assert len({s["weights_sha256"] for s in summaries}) == 4


def test_a_sweep_keeps_its_workers_and_its_runs_do_not_notice(tmp_path: Path) -> None:
    sweep = [*TINY[:-1], "model=logistic,2nn", "strategy=fedavg,scaffold"]
    done = run(tmp_path / "ray", "-m", *sweep, "engine.workers=2")
    run(tmp_path / "inline", "-m", *sweep, "engine=inline")
    assert done.stderr == ""
    assert done.stdout.count("starting 2 workers") == 2  # one for each model
    found = [hashes(tmp_path / name) for name in ("ray", "inline")]
    assert len(set(found[0].values())) == 4
    assert found[0] == found[1]


def hashes(sweep: Path) -> dict[tuple[str, str], str]:
    found = [summary(path.parent) for path in sweep.glob("*/summary.json")]
    return {(each["strategy"], each["model"]): each["weights_sha256"] for each in found}


@needs_real_data
def test_real_leaf_files_run_and_start_from_the_store_the_second_time(tmp_path: Path) -> None:
    overrides = ["dataset=leaf", f"dataset.path={REAL_DATA}/leaf", "clients=28", "model=logistic"]
    overrides += ["clients_per_round=5", "rounds=2", "engine=inline"]
    first = run(tmp_path, *overrides)
    assert "0 unseen writers instead of 3" in first.stdout
    (store,) = (tmp_path / "cache").iterdir()
    made = store.stat().st_mtime_ns
    sha = summary(tmp_path / "run")["weights_sha256"]
    run(tmp_path / "again", *overrides, f"cache={tmp_path}/cache")
    assert list((tmp_path / "cache").iterdir()) == [store]
    assert store.stat().st_mtime_ns == made
    assert summary(tmp_path / "again" / "run")["weights_sha256"] == sha


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_folder_that_holds_a_run_is_left_alone(finished) -> None:
    folder = finished[0]
    before = contents(folder / "run")
    done = run(folder, *TINY, code=2)
    assert done.stderr.startswith("error: ")
    assert "holds a run already" in done.stderr
    assert contents(folder / "run") == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_run_and_leaves_nothing_behind(tmp_path, number, code) -> None:
    command = [
        sys.executable,
        str(ROOT / "simulate.py"),
        *TINY,
        "rounds=100000",
        "engine.workers=1",
    ]
    command += [f"cache={tmp_path}/cache", f"hydra.run.dir={tmp_path}/run"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        table = tmp_path / "run" / "rounds.csv"
        deadline = time.monotonic() + 120
        while not (table.exists() and table.read_text().count("\n") > 3):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        listening, shared = listeners(process.pid), shared_by(process.pid)
        started = [line for line in family(process.pid).values() if "/ray/" in line]
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert b"Traceback" not in stderr
    assert listening  # Ray's servers
    assert set(listening) <= LOOPBACK
    # No reporter, which calls out even if told that it must not; no monitors.
    assert any("/gcs_server" in line for line in started)
    assert not [line for line in started if "dashboard.py" in line or "monitor.py" in line]
    assert "libtensorflow" not in maps  # the driver has no use for it
    assert shared
    assert not any(path.exists() for path in shared)
    assert b"python simulate.py resume=" in stderr
    orphans = subprocess.run(["pgrep", "-f", f"{tmp_path}"], capture_output=True, text=True)
    assert orphans.stdout == ""


def test_a_killed_worker_changes_nothing(finished, tmp_path: Path) -> None:
    """SIGKILL one of two workers in the middle of the run; the same bits come out."""
    command = [sys.executable, str(ROOT / "simulate.py"), *TINY, "rounds=400", "engine.workers=2"]
    command += [f"cache={tmp_path}/cache", f"hydra.run.dir={tmp_path}/run", "evaluate.every=400"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("round   5/400"):
                break
        victims = children_named(process.pid, "ray::ClientApp")
        assert len(victims) == 2, (line, family(process.pid))
        os.kill(victims[0], signal.SIGKILL)
        rest = process.stdout.read()
        assert process.wait(timeout=120) == 0
    assert "lost a worker, runs round" in rest
    run(tmp_path / "inline", *TINY, "rounds=400", "evaluate.every=400", "engine=inline")
    expected = summary(tmp_path / "inline" / "run")["weights_sha256"]
    assert summary(tmp_path / "run")["weights_sha256"] == expected
    assert len(rows(tmp_path / "run" / "rounds.csv")) == 401


def test_updates_that_are_too_many_for_the_memory_change_nothing(tmp_path: Path) -> None:
    """Two workers write them past the system's cache, where the rule reads them."""
    multikrum = [*TINY, "rounds=3", "strategy=multikrum"]
    without = "from femfed.engine import wire; wire.available_memory = lambda: 0"
    command = [sys.executable, "-c", f"{without}; import simulate; simulate.main()", *multikrum]
    command += ["engine.workers=2", f"cache={tmp_path}/cache", f"hydra.run.dir={tmp_path}/run"]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)

    assert done.returncode == 0, done.stderr
    assert f"travel through files in {tmp_path}/run" in done.stdout
    run(tmp_path / "inline", *multikrum, "engine=inline")
    expected = summary(tmp_path / "inline" / "run")["weights_sha256"]
    assert summary(tmp_path / "run")["weights_sha256"] == expected


# 127.0.0.1, the same mapped into IPv6, and ::1, as the kernel writes them
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def family(pid: int) -> dict[int, str]:
    """Return the processes below and with `pid`: process id -> command line."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            parents[int(path.name)] = (parent, (path / "cmdline").read_text())
    found = {}
    for child, (_, line) in parents.items():
        ancestor = child
        while ancestor in parents and ancestor != pid:
            ancestor = parents[ancestor][0]
        if ancestor == pid:
            found[child] = line
    return found


def children_named(pid: int, prefix: str) -> list[int]:
    """Return the processes below `pid` whose command line begins with `prefix`."""
    return sorted(child for child, line in family(pid).items() if line.startswith(prefix))


def shared_by(pid: int) -> set[Path]:
    """Return what a run has in shared memory, by the files it holds open."""
    links = [path.readlink() for path in Path(f"/proc/{pid}/fd").glob("*") if path.is_symlink()]
    return {path.parent for path in links if path.parts[1:3] == ("dev", "shm")}


def listeners(pid: int) -> list[str]:
    """Return the addresses that the processes of a run listen on, as the kernel writes them."""
    sockets = set()
    for process in family(pid):
        for path in Path(f"/proc/{process}/fd").glob("*"):
            with contextlib.suppress(OSError):
                sockets.add(str(path.readlink()))
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in sockets:
                found.append(local.split(":")[0])
    return found


def test_a_client_that_diverges_is_named_in_one_line(tmp_path: Path) -> None:
    done = run(tmp_path, *TINY, "engine=inline", "local.learning_rate=1e30", code=1)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: client ")
    assert "(writer g0000_0" in line
    assert "the run diverged, try a smaller local.learning_rate" in line

"""Settings of libraries and of the shell change neither a run's weights nor its figures."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest

ROOT = Path(__file__).resolve().parents[1]
RUN = ("rounds=1", "clients=4", "clients_per_round=2", "dataset.writers=6", "model=2nn")
KERAS = {
    "floatx": "float64",
    "epsilon": 0.5,
    "backend": "torch",
    "image_data_format": "channels_first",
}
MATPLOTLIBRC = """
text.usetex: True
figure.dpi: 10
savefig.dpi: 5
savefig.bbox: tight
font.family: No Such Font
font.size: 40
axes.facecolor: red
backend: module://no.such.backend
no.such.key: 3
"""
HOSTILE = {
    "DNNL_MAX_CPU_ISA": "SSE41",
    "FLWR_HOME": "/proc/none",
    "GRPC_VERBOSITY": "debug",
    "HYDRA_MAIN_MODULE": "os",
    "KERAS_BACKEND": "torch",
    "KERAS_MAX_EPOCHS": "many",
    "LC_ALL": "C",
    "MKL_CBWR": "COMPATIBLE",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "NO_COLOR": "1",
    "NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3",
    "NUMBA_DISABLE_JIT": "1",
    "OMP_NUM_THREADS": "7",
    "ONEDNN_DEFAULT_FPMATH_MODE": "BF16",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "ONEDNN_VERBOSE": "all",
    "OPENBLAS_CORETYPE": "Nehalem",
    "OPENBLAS_NUM_THREADS": "7",
    "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python",
    "PYTHONCOERCECLOCALE": "0",
    "PYTHONHASHSEED": "7",
    "PYTHONIOENCODING": "ascii",
    "PYTHONUTF8": "0",
    "PYTHONWARNINGS": "error",
    "RAY_BACKEND_LOG_LEVEL": "debug",
    "RAY_NAMESPACE": "mine",
    "RAY_RUNTIME_ENV_HOOK": "no.such.hook",
    "RAY_TMPDIR": "/proc/none",
    "RAY_testing_asio_delay_us": "broken",
    "TERM": "dumb",
    "TF_DETERMINISTIC_OPS": "1",
    "TF_ENABLE_ONEDNN_OPTS": "0",
    "TF_NUM_INTRAOP_THREADS": "7",
    "TF_USE_LEGACY_KERAS": "1",
    "TF_XLA_FLAGS": "--tf_xla_auto_jit=2",
    "TZ": "Asia/Seoul",
    "XLA_FLAGS": "--no_such_flag",
}


def typed(place: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Type a command in `place`; its output may be in any encoding."""
    plain = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    return subprocess.run(
        [sys.executable, *command],
        cwd=place,
        env={**plain, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=300,
    )


def simulated(place: Path, *overrides: str, **environment: str) -> tuple[str, Path]:
    """Run in `place`; return the hash of the weights and the run's folder."""
    done = typed(place, str(ROOT / "simulate.py"), *RUN, *overrides, **environment)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    (folder,) = (place / "outputs").glob("*/*")
    return json.loads((folder / "summary.json").read_text())["weights_sha256"], folder


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    place = tmp_path_factory.mktemp("clean")
    return simulated(place, "engine=inline", f"cache={place}/cache")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder to work in, and a home, with settings of every library that looks there."""
    (tmp_path / ".keras").mkdir()
    (tmp_path / ".keras" / "keras.json").write_text(json.dumps(KERAS))
    (tmp_path / "matplotlibrc").write_text(MATPLOTLIBRC)
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib" / "matplotlibrc").write_text(MATPLOTLIBRC)
    for fonts in Path(matplotlib.get_cachedir()).glob("fontlist*"):  # takes seconds to make
        shutil.copy(fonts, tmp_path / "matplotlib")
    for folder in ("conf", ".hydra"):  # of another program
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.yaml").write_text("rounds: many\n")
    return tmp_path


def settings(place: Path) -> dict[str, str]:
    return {
        **HOSTILE,
        "HOME": str(place),
        "KERAS_HOME": str(place / ".keras"),
        "MATPLOTLIBRC": str(place / "matplotlibrc"),
        "MPLCONFIGDIR": str(place / "matplotlib"),
    }


@pytest.mark.parametrize("engine", ["inline", "ray"])
def test_settings_change_no_bit(clean: tuple[str, Path], place: Path, engine: str) -> None:
    sha256, folder = clean
    overrides = [f"engine={engine}", f"cache={folder.parents[2]}/cache"]
    if engine == "ray":
        overrides.append("engine.workers=1")

    theirs, their_folder = simulated(place, *overrides, **settings(place))

    assert theirs == sha256
    assert (their_folder / "curves.png").read_bytes() == (folder / "curves.png").read_bytes()


def test_settings_change_no_contact_sheet(tmp_path: Path, place: Path) -> None:
    cache = f"cache={tmp_path}/cache"
    other = tmp_path / "other"
    other.mkdir()

    done = typed(
        place, "-m", "femfed.data", "clients=3", "clients_per_round=2", cache, **settings(place)
    )
    plain = typed(other, "-m", "femfed.data", "clients=3", "clients_per_round=2", cache)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == plain.stdout
    sheets = [next((at / "outputs").glob("*.png")).read_bytes() for at in (place, other)]
    assert sheets[0] == sheets[1]

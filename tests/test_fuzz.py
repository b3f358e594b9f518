"""Configs, command lines and files that nobody thought of: a clean refusal or a right result.

    FEMFED_FUZZ=100 pytest tests/test_fuzz.py -s

runs a hundred times as many cases, drawn anew. What may be drawn is read off the schema, `conf/`
and the files themselves, so that a new key or strategy is fuzzed by being there.
"""

import contextlib
import csv
import dataclasses
import io
import json
import lzma
import math
import os
import signal
import struct
import sys
import tempfile
import typing
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flwr.serverapp.strategy as flower
import numpy as np
import pytest
from omegaconf import DictConfig, OmegaConf

import simulate
from femfed import RunError, UserError, checkpoint, config
from femfed.data.fedscale import FedScale
from femfed.data.hub import Femnist
from femfed.data.leaf import Leaf
from femfed.data.qmnist import Qmnist
from femfed.data.source import PARTITIONS, Dataset
from femfed.data.store import Handwriting, WriterStore, stored
from femfed.data.tff import Tff
from tests import test_fedscale, test_hub, test_qmnist, test_tff
from tests.handwriting import Person, whole, write_leaf_shards

pytest.importorskip("hypothesis", reason='fuzzing needs hypothesis: pip install -e ".[test]"')

from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

TIMES = int(os.environ.get("FEMFED_FUZZ", "1"))
COUNTS: Counter[str] = Counter()

# What hypothesis keeps of itself stays out of the repository.
set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "femfed-hypothesis")

USAGE = "usage: simulate.py"  # of argparse, for a flag that Hydra does not have: several lines


def cases(number: int, **more: Any) -> settings:
    """Return the settings of a test of `number` cases: the same ones every time, unless TIMES."""
    return settings(
        max_examples=number * TIMES,
        derandomize=TIMES == 1,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        **more,
    )


@pytest.fixture(scope="module", autouse=True)
def counted() -> Iterator[None]:
    """Say at the end how many cases ran."""
    yield
    print("\nfuzz:", ", ".join(f"{number:,} {kind}" for kind, number in sorted(COUNTS.items())))


def one_line(message: str, *parts: str) -> None:
    """Assert that `message` is one line and says one of `parts`, if there are any."""
    assert message.strip()
    assert len(message.splitlines()) == 1, message
    assert not parts or any(part in message for part in parts), message


# --- configs -------------------------------------------------------------------------------------

# Numbers that mean work: all others may be as large as the schema lets them.
MOST = {"clients": 5, "clients_per_round": 5, "local.epochs": 2}
LARGE = (1_000, 2**31 - 1, 2**31, 2**63, 10**30)
FIXED = {"rounds", "engine.kind"}  # one round, in this process
PLAIN = {path.stem: OmegaConf.load(path) for path in (config.CONF / "strategy").glob("*.yaml")}
WORDS = ("uniform", "examples", "mean")
# Keys of all datasets, whose ranges are checked where they are used.
DATASET = {
    "partition": st.sampled_from(PARTITIONS),
    "alpha": st.sampled_from((0.5, 1e-9, 1e9)) | st.floats(1e-300, 1e300),
    "shards": st.integers(1, 100),
    "classes": st.sampled_from((None, "digits", "small", "A", 61, "a-j", ["0-4", "Z", 50])),
    "fraction": st.floats(0, 1, exclude_min=True),
    "min_images": st.integers(0, 200),
    "seed": st.sampled_from((0, 1, 2**40)),
}


def keys(schema: type, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield every key of the schema with its type and its range."""
    for field in dataclasses.fields(schema):
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            yield from keys(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field.type, field.metadata


def values(key: str, kind: Any, about: Any) -> st.SearchStrategy[Any] | None:
    """Return what a key of the schema may be; None of a group or a path."""
    if key in FIXED:
        return None
    if key in config.CHOICES:
        return st.sampled_from(config.CHOICES[key])
    kinds = set(typing.get_args(kind)) or {kind}
    low, high = about.get("low"), about.get("high")
    drawn: list[st.SearchStrategy[Any]] = [st.none()] if type(None) in kinds else []
    if float in kinds:
        drawn += [st.floats(low, 10 if high is None else high, exclude_max=about["below"])]
    elif int in kinds:
        drawn += [st.integers(low, MOST.get(key, low + 30))]
        large = [number for number in LARGE if high is None or number <= high]
        drawn += [] if key in MOST else [st.sampled_from(large)]
    elif bool in kinds:
        drawn += [st.booleans()]
    else:
        return None
    return st.one_of(drawn)


def like(value: Any) -> st.SearchStrategy[Any]:
    """Return values around a strategy's own: of its kind, not all of them in its range."""
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int | None):
        return st.none() | st.integers(0, 5)
    if isinstance(value, float):
        return st.sampled_from((value, 0.0, 0.5, 1.0)) | st.floats(0, 3)
    return st.just(value) | st.sampled_from(WORDS)


def written(value: Any) -> str:
    """Return a value as it is typed at the command line."""
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    return json.dumps(value) if isinstance(value, bool | None) else str(value)


SCHEMA = {
    key: drawn
    for key, kind, about in keys(config.Config)
    if (drawn := values(key, kind, about)) is not None
}
SCHEMA |= {
    f"dataset.{key}": DATASET.get(str(key), like(value))
    for key, value in OmegaConf.load(config.CONF / "config.yaml").dataset.items()
}


@st.composite
def commands(draw: st.DrawFn) -> list[str]:
    """Draw a command line of a run that takes no time, whose keys are all in their ranges."""
    name = draw(st.sampled_from(sorted(PLAIN)))
    given: dict[str, Any] = {"strategy": name}
    for key, value in PLAIN[name].items():
        if isinstance(value, DictConfig):
            targets = [f"flwr.serverapp.strategy.{each}" for each in flower.__all__]
            given[f"strategy.{key}._target_"] = draw(st.sampled_from(targets))
        elif key != "_target_" and draw(st.booleans()):
            given[f"strategy.{key}"] = draw(like(value))
    given["model"] = draw(st.sampled_from(("logistic", "2nn")))
    given["model.units"] = draw(st.lists(st.integers(1, 5), max_size=2))
    given["model.invert"] = draw(st.booleans())
    for key in draw(st.lists(st.sampled_from(sorted(SCHEMA)), unique=True, max_size=8)):
        given[key] = draw(SCHEMA[key])
    clients = given.setdefault("clients", MOST["clients"])
    given["clients_per_round"] = min(clients, given.get("clients_per_round", clients))
    given |= {"rounds": 1, "engine": "inline"}
    groups_first = sorted(given, key=lambda key: (key.count("."), key))
    return [f"{key}={written(given[key])}" for key in groups_first]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all runs."""
    return tmp_path_factory.mktemp("cache")


@cases(10)
@given(command=commands())
def test_a_valid_config_runs_or_says_why_not(command: list[str], cache: Path) -> None:
    COUNTS["configs"] += 1
    cfg = config.compose([*command, "dataset.writers=8", f"cache={cache}"])
    with tempfile.TemporaryDirectory() as folder:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                simulate.run_one(cfg, Path(folder), "fuzz", "fuzz", config.Place(), lambda: None)
        except (UserError, RunError) as error:
            event(type(error).__name__)
            one_line(str(error))
            return
        event("ran")
        is_complete(Path(folder), finite=cfg.get("stop_on_divergence", True))


def is_complete(folder: Path, finite: bool) -> None:
    """Assert that a run left all its files and, if `finite`, no other numbers in them."""
    for name in ("model.keras", "curves.png", "writers.png"):
        assert (folder / name).stat().st_size
    (file,) = (folder / "checkpoint").iterdir()
    saved = checkpoint.load(file)
    arrays = [*saved.weights, *(array for some in saved.state.values() for array in some)]
    assert not finite or all(np.isfinite(array).all() for array in arrays)
    # Nothing is held out of very few images: there is no accuracy then.
    about = json.loads((folder / "summary.json").read_text())
    assert 0 <= (about["test_accuracy"] or 0) <= 1
    for name in ("rounds.csv", "clients.csv", "writers.csv"):
        with (folder / name).open(newline="") as table:
            rows = list(csv.DictReader(table))
        assert rows or name == "clients.csv", name  # with a failure_rate, all of them may fail
        for key, cell in (cell for row in rows for cell in row.items()):
            if cell and key not in ("writer", "role"):
                assert math.isfinite(float(cell)) or not finite, (name, key)


# --- command lines -------------------------------------------------------------------------------

JUNK = (
    *("", " ", "null", "nan", "-inf", "1e999", "-1", "0", "1.5", "9" * 400, "x" * 20_000, "true"),
    *("'", '"', "[", "]", "{a: 1}", "{a:{b:[1,{c:2}]}}", "[[[[1]]]]", "[1,2]", "1,2", "a=b", "\\"),
    *(
        "\\\n",
        "1\n2",
        "\t",
        "\u2028",
        "\x85",
        "\x1b[31m",
        "\U0001f642",
        "\udcff",
        "???",
        "/",
        "../..",
    ),
    *("${oc.env:HOME}", "${oc.env:NO_SUCH_VARIABLE}", "${", "${nowhere}", "${seed}", "${.x}"),
    *("${oc.decode:'['}", "${oc.create:{a:1}}", "os.system", "subprocess.Popen", "@", "a@b", "*"),
    *("femfed.client.Local", "femfed.data.store.Handwriting", "range(1,3)", "choice(1,2)"),
    *("glob(*)", "sort(1,2)", "int(1.5)"),
)
ARGUMENTS = (
    *("dataset", "strategy=", "model=null", "engine=[inline]", "experiment=[homework,homework]"),
    *("=", "+=1", "~clients", "~local", "~strategy", "~dataset.seed", "+schema=x", "clients", "[]"),
    *("local={}", "local=null", "engine={kind:inline}", "+local.x=1", "+engine.x=1", "++clients=x"),
    *("strategy._target_=os.system", "model._target_=femfed.data.leaf.Leaf", "~model._target_"),
    *("dataset._target_=femfed.models.Dense", "strategy@model=fedavg", "-x", "--", "hydra=1"),
    *("+experiment@local=homework", "strategy.rule=1", "+strategy.rule.x={}", "defaults=[]"),
    *("hydra/launcher=nothing", "hydra.job.chdir=true", "++resume=/nowhere"),
)


@st.composite
def junk(draw: st.DrawFn) -> list[str]:
    """Draw a command line with one to three things wrong with it, or at least odd."""
    command = draw(commands())
    names = {"dataset", "model", "strategy", "engine", "cache", "_target_", "resume", *SCHEMA}
    names = sorted(names | {each.partition("=")[0] for each in command})
    # No NUL: the system has none in arguments.
    text = st.text(st.characters(exclude_characters="\0"), max_size=30)
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(names))
        value = draw(st.sampled_from(JUNK) | text)
        place = draw(st.integers(0, len(command) - 1))
        match draw(st.sampled_from(("value", "key", "argument", "text", "letter"))):
            case "value":
                command.append(f"{draw(st.sampled_from(('', '', '+', '++', '~')))}{key}={value}")
            case "key":
                command.append(
                    f"{key}{draw(st.sampled_from(('x', '.x', '.', '@', '/x', ' ')))}={value}"
                )
            case "argument":
                command.append(draw(st.sampled_from(ARGUMENTS)))
            case "text":
                command.append(draw(text))
            case "letter":
                line, letter = command[place], draw(st.sampled_from("=.,:${}[]'\"\\ ~+-e0\n"))
                at = draw(st.integers(0, len(line)))
                command[place] = line[:at] + letter + line[at + draw(st.integers(0, 1)) :]
    return command


def typed(command: list[str], folder: Path) -> tuple[Any, str]:
    """Type the command in this process, up to where the run would begin; return code and stderr."""

    def begin(cfg: DictConfig, *_: object) -> None:
        for group in ("dataset", "strategy", "model"):
            config.make(cfg[group], group)
        OmegaConf.to_container(cfg, resolve=True)

    paths = [f"hydra.{mode}.dir={folder}/outputs/now" for mode in ("run", "sweep")]
    paths.append(f"cache={folder}/cache")
    stderr = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["simulate.py", *command, *paths])
        patch.setattr(simulate, "exit_codes", [])
        patch.setattr(simulate, "run_one", begin)
        patch.setattr(signal, "signal", lambda *_: None)  # Ctrl-C stays pytest's
        for name in ("finished", "composed"):
            patch.setattr(simulate, name, [])
        patch.setenv("HYDRA_FULL_ERROR", "")
        with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
            simulate.main()
    return exit.value.code, stderr.getvalue()


@cases(40)
@given(command=junk())
def test_a_command_line_is_understood_or_refused_in_a_line(command: list[str]) -> None:
    COUNTS["command lines"] += 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        code, stderr = typed(command, folder)
        event(f"exit code {code}")
        if code != 0 and not stderr.startswith(USAGE):
            assert code == 2, stderr
            one_line(stderr)
            assert stderr.startswith("error: ")
            assert list(folder.iterdir()) == []


# --- files ---------------------------------------------------------------------------------------

TOKENS = (
    *(b"NaN", b"-1", b"62", b"1e999", b"null", b'"', b"\n", b"\r", b",", b"[", b"}", b"../", b"\0"),
    *(
        b"\xef\xbb\xbf",
        b"\xff\xff\xff\xff",
        b"\x7f\xff\xff\xff",
        b"\0\0\0\0\0\0\0\x80",
        b"\xed\xa0\x80",
    ),
    *(b"\\u000a", b"\\ud800", b"\xe2\x80\xa8", b"[" * 2000),
)
CHANGES: dict[str, Callable[[bytes, bytes, bytes, int, bytes], bytes]] = {
    # What stands before, there and after; a number and bytes at will.
    "flip": lambda a, b, c, n, new: a + bytes([b[0] ^ 1 << n % 8 if b else 0]) + b[1:] + c,
    "byte": lambda a, b, c, n, new: a + new[:1] + b[1:] + c,
    "insert": lambda a, b, c, n, new: a + new + b + c,
    "delete": lambda a, b, c, n, new: a + c,
    "truncate": lambda a, b, c, n, new: a,
    "duplicate": lambda a, b, c, n, new: a + b + b + c,
    "splice": lambda a, b, c, n, new: a + (a + b + c)[n % (len(a + b + c) + 1) :],
    "zero": lambda a, b, c, n, new: a + bytes(len(b)) + c,
    "ones": lambda a, b, c, n, new: a + b"\xff" * len(b) + c,
    "token": lambda a, b, c, n, new: a + TOKENS[n % len(TOKENS)] + (b + c)[n % 4 :],
}
Change = tuple[str, str, int, int, bytes]
MUTATION = st.lists(
    st.tuples(
        st.sampled_from(sorted(CHANGES)),
        st.sampled_from(("head", "tail", "anywhere")),
        st.integers(0, 2**24),
        st.integers(0, 2**24),
        st.binary(min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=3,
)


def mutated(content: bytes, changes: list[Change]) -> bytes:
    """Return `content` after the changes, each of some bytes or of up to half of them."""
    for kind, where, position, number, new in changes:
        size = len(content)
        reach = size if where == "anywhere" else min(size, 200)
        start = position % (reach + 1) + (size - reach if where == "tail" else 0)
        stop = start + 1 + number % (16 if number % 3 else max(1, size // 2))
        before, there, after = content[:start], content[start:stop], content[stop:]
        content = CHANGES[kind](before, there, after, number, new)
    return content


def repaired(content: bytes) -> bytes:
    """Return a PNG with right checksums, so that what is wrong in its chunks is looked at."""
    done, at = content[:8], 8
    while at + 12 <= len(content):
        end = at + 8 + int.from_bytes(content[at : at + 4])
        body = content[at + 4 : end]
        done += content[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at = end + 4
    return done + content[at:]


def people() -> list[Person]:
    """Return three writers of noise on white paper."""
    random = np.random.default_rng(0)
    found = []
    for place, size in enumerate((3, 2, 4)):
        images = np.full((size, 28, 28), 255, np.uint8)
        images[:, 4:24, 4:24] = random.integers(0, 256, (size, 20, 20))
        found.append((f"f{place:04}_14", images, random.integers(0, 10, size)))
    return found


def write_leaf(folder: Path) -> None:
    write_leaf_shards(folder, people(), test_fraction=0.3)


def write_hdf5(folder: Path) -> None:
    test_tff.write_hdf5(folder / test_tff.TRAIN, people())
    test_tff.write_hdf5(folder / test_tff.TEST, people()[:2])


def write_sqlite(folder: Path) -> None:
    splits = {"all_train": people(), "all_test": people()[:2]}
    test_tff.write_sqlite(folder / test_tff.DATABASE, splits)


def write_lzma(folder: Path) -> None:
    write_sqlite(folder)
    database = folder / test_tff.DATABASE
    database.with_suffix(".sqlite.lzma").write_bytes(lzma.compress(database.read_bytes()))
    database.unlink()


def write_fedscale(folder: Path) -> None:
    test_fedscale.write(
        folder, "train", test_fedscale.samples("5", 0, 10) + test_fedscale.samples("3", 61)
    )
    test_fedscale.write(folder, "test", test_fedscale.samples("105", 1))


def write_parquet(folder: Path) -> None:
    if test_hub.pa is None:
        pytest.skip('Parquet needs the optional libraries of femfed[hub]: pip install -e ".[hub]"')
    test_hub.write(folder / "train-00000-of-00001.parquet", test_hub.columns())


def write_idx(folder: Path) -> None:
    (folder / test_qmnist.IMAGES).write_bytes(test_qmnist.idx(test_qmnist.pixels(7)))
    (folder / test_qmnist.LABELS).write_bytes(
        test_qmnist.idx(test_qmnist.table(test_qmnist.OWNERS))
    )
    (folder / test_qmnist.TEST_IMAGES).write_bytes(test_qmnist.idx(test_qmnist.pixels(2)))
    (folder / test_qmnist.TEST_LABELS).write_bytes(test_qmnist.idx(test_qmnist.table([7, 8])))


def write_gzip(folder: Path) -> None:
    write_idx(folder)
    for file in list(folder.iterdir()):
        test_qmnist.gzipped(file)


def write_tsv(folder: Path) -> None:
    (folder / test_qmnist.IMAGES).write_bytes(test_qmnist.idx(test_qmnist.pixels(7)))
    np.savetxt(
        folder / "qmnist-train-labels.tsv", test_qmnist.table(test_qmnist.OWNERS), "%d", "\t"
    )


SOURCES: dict[str, tuple[Callable[[Path], None], Callable[[str], Dataset]]] = {
    "leaf": (write_leaf, lambda path: whole(Leaf, path=path)),
    "tff hdf5": (write_hdf5, lambda path: whole(Tff, path=path)),
    "tff sqlite": (write_sqlite, lambda path: whole(Tff, path=path)),
    "tff lzma": (write_lzma, lambda path: whole(Tff, path=path)),
    "fedscale": (write_fedscale, lambda path: whole(FedScale, path=path, held_out="test")),
    "femnist": (write_parquet, lambda path: whole(Femnist, path=path)),
    "qmnist idx": (write_idx, lambda path: whole(Qmnist, path=path)),
    "qmnist gzip": (write_gzip, lambda path: whole(Qmnist, path=path)),
    "qmnist tsv": (write_tsv, lambda path: whole(Qmnist, path=path)),
}


@pytest.fixture(scope="module", params=SOURCES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A dataset of one of the formats: its files by name, and what reads them."""
    write, dataset = SOURCES[request.param]
    folder = tmp_path_factory.mktemp("source")
    write(folder)
    files = {
        str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()
    }
    is_valid(dataset(str(folder)).convert(folder / "cache", 2))
    return files, dataset


@cases(40)
@given(place=st.integers(0, 99), changes=MUTATION, repair=st.booleans())
def test_a_broken_file_is_refused_or_gives_a_valid_store(
    source: Any, place: int, changes: list[Change], repair: bool
) -> None:
    COUNTS["files"] += 1
    files, dataset = source
    hit = sorted(files)[place % len(files)]
    with tempfile.TemporaryDirectory(prefix="fuzz") as name:
        root, cache = Path(name) / "data", Path(name) / "cache"
        for file, content in files.items():
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            if file == hit:
                content = mutated(content, changes)
                content = repaired(content) if repair and file.endswith(".png") else content
            (root / file).write_bytes(content)
        made = dataset(str(root))
        try:
            store = made.convert(cache, 2)
        except UserError as error:
            event("refused")
            one_line(str(error), *(Path(file).name for file in files))
            assert not cache.exists() or list(cache.iterdir()) == []
            return
        event("valid")
        assert list(cache.iterdir()) == [store.folder]
        is_valid(store)
        for kept in ({"classes": "digits"}, {"fraction": 0.4}, {"min_images": 3, "classes": "a-z"}):
            try:
                is_valid(dataclasses.replace(made, **kept).select(store))
            except UserError as error:
                one_line(str(error), "dataset.classes")


def is_valid(store: WriterStore) -> None:
    """Assert that the store's counts agree with each other and that every writer can be read."""
    assert len(store) == len(set(store.names)) == len(store.examples) > 0
    assert len(store.numbers) == len(store.subject_numbers) == len(store.apart) == len(store)
    assert len(store.train_examples) == len(store)
    assert (store.examples > 0).all()
    assert ((store.train_examples >= -1) & (store.train_examples <= store.examples)).all()
    rows = np.arange(len(store.labels)) if store.rows is None else store.rows
    assert len(rows) == store.offsets[-1]
    assert store.images.shape == (len(store.labels), 28, 28)
    assert store.images.dtype == store.labels.dtype == np.uint8
    for index, name in enumerate(store.names):
        writer = store.writer(index, 0.2, 0)
        one_line(name)
        assert writer.images.shape == (store.examples[index], 28, 28)
        assert int(writer.images.sum()) >= 0  # every page of it is there
        assert (writer.labels < 62).all()
        assert sorted([*writer.train, *writer.test]) == list(range(len(writer.labels)))


# --- what femfed wrote itself --------------------------------------------------------------------


@pytest.mark.parametrize("file", ["index.json", "images.u8", "labels.u8", "rows.i32"])
def test_a_damaged_store_is_refused_or_made_again(file: str) -> None:
    def writers() -> Iterator[Handwriting]:
        for place, (name, images, labels) in enumerate(people()):
            yield Handwriting(name, 0, place, images, labels)

    @cases(40, phases=[Phase.generate], report_multiple_bugs=False)
    @given(changes=MUTATION)
    def damage(changes: list[Change]) -> None:
        COUNTS["stores"] += 1
        with tempfile.TemporaryDirectory() as name:

            def opened() -> WriterStore:
                store = stored(Path(name), {"dataset": "fuzz", "path": name}, writers)
                # Only a view has rows.
                view = whole(Leaf, path=name, min_images=3)
                return view.select(store) if file == "rows.i32" else store

            broken = opened().folder / file
            broken.write_bytes(mutated(broken.read_bytes(), changes))
            try:
                store = opened()
            except UserError as error:
                one_line(str(error), name)
                return
            is_valid(store)

    damage()


@cases(150)
@given(changes=MUTATION)
def test_a_damaged_checkpoint_is_refused_or_whole(changes: list[Change]) -> None:
    COUNTS["checkpoints"] += 1
    weights = [np.linspace(-1, 1, 60, dtype=np.float32).reshape(5, 12), np.zeros(3, np.float32)]
    saved = checkpoint.Checkpoint(7, weights, {"momentum": [-w for w in weights], "empty": []})
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint.save(Path(folder), saved)
        path.write_bytes(mutated(path.read_bytes(), changes))
        try:
            loaded = checkpoint.load(path)
        except checkpoint.DamagedError:
            return
    assert (loaded.round, list(loaded.state)) == (7, list(saved.state))
    for ours, theirs in (
        (saved.weights, loaded.weights),
        (saved.state["momentum"], loaded.state["momentum"]),
        (saved.state["empty"], loaded.state["empty"]),
    ):
        assert [(w.shape, w.dtype, w.tobytes()) for w in ours] == [
            (w.shape, w.dtype, w.tobytes()) for w in theirs
        ]

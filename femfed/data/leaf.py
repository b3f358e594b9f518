"""LEAF's FEMNIST: JSON shards of about 100 writers, stored shard by shard.

Caldas et al., "LEAF: A Benchmark for Federated Settings", 2018, https://arxiv.org/abs/1812.01097,
made by https://github.com/TalwalkarLab/leaf (`preprocess.sh --sf 1.0 -k 0 -t sample`). A shard is

    {"users": ["f0027_29", ...], "num_samples": [90, ...],
     "user_data": {"f0027_29": {"x": [[784 pixels k/255], ...], "y": [28, ...]}, ...}}

and stands either in two files, `train/all_data_{k}_niid_0_keep_0_train_9.json` and
`test/all_data_{k}_niid_0_keep_0_test_9.json`, or in one file that publishes no split. Files of both
halves in one folder are told apart by their names. Writers who stand in the test half only
(`preprocess.sh -t user`) are kept apart.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from femfed import UserError, printable
from femfed.data.source import (
    Dataset,
    Published,
    files_in,
    folder_that_fits,
    inside,
    labels_in_order,
    located,
    refuse_other_layout,
    stored_files,
    unreadable,
)
from femfed.data.store import CLASSES, Bytes, Handwriting, OnWriter, WriterStore

PIXELS = 28 * 28
ENDS = (".json",)
MAKE_AGAIN = "copy or download the file again, or make it again with LEAF's preprocess.sh"

T = TypeVar("T")


@dataclass(frozen=True)
class Leaf(Dataset):
    """FEMNIST as LEAF's scripts publish it, in files the user has.

    Attributes:
        path: a folder with `train/` and `test/`, a folder of shards without a split, or one shard;
            or a folder above one of these.
        labels: the characters that the labels 0, 1, 2, ... stand for, written like `classes`; null
            for 0-9, A-Z, a-z. FedProx's FEMNIST has `a-j`.
    """

    path: str | None
    labels: Any = None

    name = "leaf"
    variant = "LEAF FEMNIST (--sf 1.0 -k 0 -t sample)"
    published = Published(writers=3_597, images=817_851)
    family = "LEAF FEMNIST"
    labels_hint = (
        "; if they stand for others, name these (dataset.labels=a-j for FedProx's FEMNIST)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels is not None:
            labels_in_order("labels", self.labels)

    def convert(self, cache: Path, writers: int, on_writer: OnWriter | None = None) -> WriterStore:
        """Return the store of the shards; all their writers are in it, however many are wanted.

        The shards themselves are read only if no store was made of them yet, or if a file's size or
        time has changed since.

        Raises:
            UserError: the path, a file's JSON or a writer's data is not what LEAF writes.
        """
        root = located(
            self.path, self.name, "the folder that holds LEAF's train/ and test/ (or JSON shards)"
        )
        try:
            shards = _find(root)
        except OSError as error:
            raise unreadable(Path(error.filename or root), error) from error
        source: dict[str, Any] = {"dataset": self.name}
        labels: Sequence[int] = range(CLASSES)
        if self.labels is not None:
            labels = source["labels"] = labels_in_order("labels", self.labels)
        files = [file for shard in shards for file in shard.files]
        lookup = np.array(labels, np.uint8)
        return stored_files(cache, source, root, files, lambda: _writers(shards, lookup), on_writer)


@dataclass(frozen=True)
class _Shard:
    """Where one shard lies: in a train and a test file, or in one file without a split."""

    number: int
    files: tuple[Path, ...]


class _Contents(msgspec.Struct):
    """A shard's file; the writers stay undecoded bytes until their turn comes."""

    users: list[str]
    num_samples: list[int | float]
    user_data: dict[str, msgspec.Raw]


class _Samples(msgspec.Struct):
    """One writer's data in one file."""

    x: list[list[float]]
    y: list[int | float]  # some write 3.0


def _find(root: Path) -> list[_Shard]:
    """Return the shards below `root`, in natural numeric order."""
    if not root.is_dir():
        refuse_other_layout(root, ENDS)
        return _numbered([(root,)])
    folder = folder_that_fits(root, _fits)
    if folder is None:
        raise _nothing_in(root)
    halves = {half: (folder / half).is_dir() for half in ("train", "test")}
    if not any(halves.values()):
        files = _json_files(folder)
        train = [file for file in files if _half_of(file) == "train"]
        test = [file for file in files if _half_of(file) == "test"]
        if not (train and test):
            return _numbered([(file,) for file in files])
        if others := [file for file in files if _half_of(file) is None]:
            raise UserError(
                f"{others[0]} stands beside {train[0].name} and {test[0].name} and is of neither "
                "half by its name; expected train and test shards, so that no test image is "
                "trained on; take it away"
            )
        return _paired(folder, _by_number(folder, train), folder, _by_number(folder, test))
    for half, other in (("train", "test"), ("test", "train")):
        if not halves[half]:
            raise UserError(
                f"{folder} has a folder {other}/ but no {half}/; expected both; put the {half} "
                f"shards in {folder / half}, or use the {other} shards alone with "
                f"dataset.path={folder / other}"
            )
    places = [folder / half for half in ("train", "test")]
    by_number = [_by_number(place, _json_files(place)) for place in places]
    return _paired(places[0], by_number[0], places[1], by_number[1])


def _fits(folder: Path) -> bool:
    halves = any((folder / half).is_dir() for half in ("train", "test"))
    return halves or bool(files_in(folder, ENDS))


def _half_of(file: Path) -> str | None:
    """Return the half that a shard is of by its name, if it says so."""
    found = set(re.findall(r"train|test", file.stem.lower()))
    return found.pop() if len(found) == 1 else None


def _paired(
    train_folder: Path,
    train: dict[int | None, Path],
    test_folder: Path,
    test: dict[int | None, Path],
) -> list[_Shard]:
    for shards, others, half, folder in (
        (train, test, "test", test_folder),
        (test, train, "train", train_folder),
    ):
        for number, file in shards.items():
            if number not in others:
                shard = "a shard without a number" if number is None else f"shard {number}"
                raise UserError(
                    f"{file} has no partner: {half}/ holds no file of {shard}; expected one "
                    f"{half} file for every shard; add it to {folder}, or take {file.name} "
                    "away"
                )
    return _numbered([(file, test[number]) for number, file in train.items()])


def _json_files(folder: Path) -> list[Path]:
    files = files_in(folder, ENDS)
    if not files:
        raise _nothing_in(folder)
    return sorted(files, key=lambda file: _natural(file.name))


def _nothing_in(folder: Path) -> UserError:
    return UserError(
        f"no JSON files in {folder}; expected LEAF shards such as "
        "all_data_0_niid_0_keep_0_train_9.json; give dataset.path=DIR the folder that holds "
        f"train/ and test/, or the shards themselves{inside(folder, ENDS)}"
    )


def _natural(name: str) -> tuple[list[Any], str]:
    """Return a sort key by which shard 10 comes after shard 9."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


def _shard_number(file: Path) -> int | None:
    """Return k of `all_data_{k}`, else the first integer of the name, else None."""
    found = re.search(r"all_data_([0-9]+)", file.stem) or re.search(r"([0-9]+)", file.stem)
    return int(found[1]) if found and len(found[1]) < 10 else None


def _by_number(folder: Path, files: list[Path]) -> dict[int | None, Path]:
    shards: dict[int | None, Path] = {}
    for file in files:
        number = _shard_number(file)
        if number in shards:
            raise UserError(
                f"{shards[number].name} and {file.name} in {folder} are both shard {number} by "
                "their names; expected one file a shard, so that train and test pair up; take one "
                "away or name them all_data_0.json, all_data_1.json, ..."
            )
        shards[number] = file
    return shards


def _numbered(shards: list[tuple[Path, ...]]) -> list[_Shard]:
    """Number the shards as their names do or, where that is ambiguous, by their places."""
    numbers = [number for files in shards if (number := _shard_number(files[0])) is not None]
    if len(set(numbers)) < len(shards):
        numbers = list(range(len(shards)))
    return [_Shard(number, files) for number, files in zip(numbers, shards, strict=True)]


def _writers(shards: list[_Shard], labels: NDArray[np.uint8]) -> Iterator[Handwriting]:
    homes: dict[str, _Shard] = {}
    for shard in shards:
        # A function of its own, so that one shard's bytes are gone before the next one's come.
        for writer in _shard_writers(shard, labels):
            home = homes.setdefault(writer.name, shard)
            if home is not shard:
                raise UserError(
                    f"writer {printable(writer.name)} stands in {home.files[0]} and in "
                    f"{shard.files[0]}; expected one shard a writer; take one away, "
                    "and keep train and test shards apart, in train/ and test/"
                )
            yield writer


def _shard_writers(shard: _Shard, labels: NDArray[np.uint8]) -> Iterator[Handwriting]:
    contents = [(file, _read(file)) for file in shard.files]
    counts = [dict(zip(part.users, part.num_samples, strict=True)) for _, part in contents]
    names = dict.fromkeys(chain.from_iterable(part.users for _, part in contents))
    for subject_number, name in enumerate(names):
        halves = [
            _samples(file, part, name, count, labels)
            for (file, part), count in zip(contents, counts, strict=True)
        ]
        yield Handwriting(
            name=name,
            number=shard.number,
            subject_number=subject_number,
            images=np.concatenate([images for images, _ in halves]),
            labels=np.concatenate([own for _, own in halves]),
            train_examples=len(halves[0][1]) if len(contents) == 2 else None,
        )


def _read(file: Path) -> _Contents:
    try:
        text = file.read_bytes()
    except OSError as error:
        raise unreadable(file, error) from error
    contents = _decode(text, _Contents, str(file))
    users, counts = contents.users, contents.num_samples
    if len(users) != len(counts):
        raise UserError(
            f"{file}: {len(users)} users but {len(counts)} num_samples; expected one count a "
            f"user; {MAKE_AGAIN}"
        )
    listed: set[str] = set()
    for place, name in enumerate(users):
        where = f"{file}: writer {printable(name)}"
        if name in listed:
            raise UserError(
                f"{where} stands in users twice, again at place {place}; expected once; "
                f"{MAKE_AGAIN}"
            )
        listed.add(name)
        if name not in contents.user_data:
            raise UserError(
                f"{where}, place {place} of users, is missing in user_data; expected "
                f"the data of every user; {MAKE_AGAIN}"
            )
    for name in contents.user_data:
        if name not in listed:
            raise UserError(
                f"{file}: writer {printable(name)} stands in user_data but not in users; expected "
                f"every writer in both; {MAKE_AGAIN}"
            )
    return contents


def _samples(
    file: Path,
    contents: _Contents,
    name: str,
    counts: dict[str, int | float],
    classes: NDArray[np.uint8],
) -> tuple[Bytes, NDArray[np.uint8]]:
    """Return a writer's images and labels in one file: none if it stands in the partner only."""
    if name not in contents.user_data:
        return np.empty((0, 28, 28), np.uint8), np.empty(0, np.uint8)
    where = f"{file}: writer {printable(name)}"
    samples = _decode(contents.user_data[name], _Samples, where)
    x, y = samples.x, samples.y
    if len(x) != len(y):
        raise UserError(
            f"{where}: {len(x)} images in x but {len(y)} labels in y; expected as many labels as "
            f"images; {MAKE_AGAIN}"
        )
    count = counts[name]
    if count != len(y):
        raise UserError(
            f"{where}: num_samples says {count} but user_data holds {len(y)} images; expected the "
            f"same number; {MAKE_AGAIN}"
        )
    for at, image in enumerate(x):
        if len(image) != PIXELS:
            raise UserError(
                f"{where}: image {at} has {len(image)} values; expected {PIXELS} (28 x 28); "
                f"{MAKE_AGAIN}"
            )
    for at, label in enumerate(y):
        if not 0 <= label < len(classes) or label != int(label):
            named = "0-9, A-Z, a-z" if len(classes) == CLASSES else "those of dataset.labels"
            raise UserError(
                f"{where}: label {label} at image {at}; expected 0..{len(classes) - 1} ({named}); "
                f"{MAKE_AGAIN}"
            )
    pixels = np.fromiter(chain.from_iterable(x), np.float64, len(x) * PIXELS)
    inside = (pixels >= 0) & (pixels <= 1)
    if not inside.all():
        at, pixel = divmod(int(np.argmin(inside)), PIXELS)
        raise UserError(
            f"{where}: pixel {pixel} of image {at} is {x[at][pixel]}; expected 0..1 with white "
            "paper 1; divide values of 0..255 by 255, undo any other normalisation"
        )
    images = np.rint(pixels * 255).astype(np.uint8).reshape(-1, 28, 28)
    return images, classes[np.asarray(y, np.int64)]


def _decode(text: bytes | msgspec.Raw, kind: type[T], where: str) -> T:
    """Return `text` as `kind`; whatever is wrong with it is told with `where` it is."""
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.ValidationError as error:
        keys = ", ".join(kind.__annotations__)
        raise UserError(
            f"{where}: not LEAF's schema: {error}; expected an object with {keys}; {MAKE_AGAIN}"
        ) from error
    except UnicodeDecodeError as error:
        at = bytes(text).find(error.object) + error.start
        problem = f"not UTF-8 at byte {at}: {error.reason}"
        raise UserError(f"{where}: {problem}; expected UTF-8 JSON; {MAKE_AGAIN}") from error
    except RecursionError as error:
        problem = "not LEAF's schema: nested too deeply to be read"
        raise UserError(f"{where}: {problem}; expected a LEAF shard; {MAKE_AGAIN}") from error
    except msgspec.DecodeError as error:
        problem = _malformed(bytes(text), str(error))
        raise UserError(f"{where}: {problem}; {MAKE_AGAIN}") from error


def _malformed(text: bytes, message: str) -> str:
    """Say where `text` ceases to be JSON, by byte and by what LEAF has there."""
    found = re.search(r"(.*) \(byte ([0-9]+)\)", message)
    if not found:
        try:
            text.decode()
        except UnicodeDecodeError as error:
            place = _place(text, error.start)
            return f"not UTF-8 at byte {error.start}{place}: {error.reason}; expected UTF-8 JSON"
        place = _place(text, len(text))
        return f"the JSON is cut off after {len(text)} bytes{place}; expected a whole LEAF shard"
    at = int(found[2])
    # msgspec points one byte behind a sign and behind the first byte too many.
    at -= text.startswith(b"-Infinity", max(0, at - 1)) or "trailing" in found[1]
    excerpt = text[at : at + 12].decode(errors="backslashreplace")
    if re.match(r"-?(NaN|Infinity)", excerpt):
        return (
            f"a value that is not finite, {excerpt!r}, at byte {at}{_place(text, at)}; expected "
            "pixels of 0..1"
        )
    return f"{found[1]} at byte {at}{_place(text, at)}: {excerpt!r}; expected UTF-8 JSON"


def _place(text: bytes, at: int) -> str:
    """Return the writer and the image or label that byte `at` belongs to, if it does to any."""
    start = text.rfind(b"{", 0, at)
    key = re.search(rb'"([^"]*)"\s*:\s*$', text[max(0, start - 200) : max(0, start)])
    closed = text.find(b"}", start, at) >= 0
    if closed or not key or key[1] == b"user_data":
        return ""
    place = f", in writer {printable(key[1].decode(errors='backslashreplace'))}"
    x, y = text.rfind(b'"x"', start, at), text.rfind(b'"y"', start, at)
    if y > x:
        return f"{place}, label {text.count(b',', y, at)}"
    images = text.count(b"[", x, at) - 1 if x >= 0 else 0
    if images < 1:
        return place
    return f"{place}, image {images - 1}, pixel {text.count(b',', text.rfind(b'[', x, at), at)}"

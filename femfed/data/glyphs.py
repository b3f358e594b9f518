"""Synthetic writers: FEMNIST's 62 characters drawn as pen strokes, offline and deterministic.

A writer is a pure function of (seed, writer): neither the number of writers nor the process that
draws them matters. Each has a hand of their own (slant, pen, proportions, roundness, tremor, the
letter shapes they were taught), keeps to it, and scatters around it from image to image.

The shapes stand in ALLOGRAPHS. Nothing here is taken from a font or from anybody's images; only
sizes, positions, greys and class frequencies were fitted to published statistics of FEMNIST.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache as cached
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from femfed.data.store import CHARACTERS, CLASSES, Bytes, Handwriting, WriterStore, stored
from femfed.seeds import generator

VERSION = 2  # raise it when a writer changes: stores drawn before are then drawn again
SIDE = 28  # pixels
SHARD = 100  # writers that share a shard number

Floats = NDArray[np.float32]

# How each character may be written: a line is the character and its allographs, divided by commas,
# each with its frequency after *.
#
# A point is two digits, x and y: x grows to the right, y upwards from the baseline 0 over the
# x-height 5 to the capitals' height 9; a, b, c, d are 1 to 4 below the baseline. A blank joins two
# points by a straight line, ~ by a curve, a point twice over is a corner between two curves and /
# lifts the pen.
ALLOGRAPHS = """
0  37~06~03~30~63~55~37 *5, 28~06~03~30~63~66~48~28 *3, 48~28~06~02~20~52~65~58~38 *2
0  26~04~02~20~43~46~26 *2, 37~06~03~30~63~66~37 / 11 57 *1
1  39 30 *9, 39~34~40 *1, 17 39 30 *1.5, 17 39 30 / 10 50 *.5
2  07~39~67~44~00 60 *5, 07~29~57~44~11~01~12~30~61 *3, 08~39~57~00 60~71 *2
2  07~39~67~44~00~21~60 *2
3  08~39~67~25 25~54~62~30~01 *5, 09 69 35 35~64~51~20~01 *1, 08~39~67~36~25~36~53~30~01 *2
3  07~29~58~46~25 25~54~52~20~01 *3
4  19 04 64 / 59 50 *4, 50 59 03 63 *2, 19~15~04 64 / 69 40 *3, 09~05~24~57 69 50 *3
4  08 04~24~56 / 59 50 *2
5  69 19 15~46~63~40~01 *3, 19 05~46~63~30~01 / 19 79 *4, 69~29~16~45~63~30~01 *2
5  79 29 15~35~53~30~00 *2
6  59~24~02~30~52~34~12 *3, 49~13~01~20~52~34~12 *3, 38~05~02~20~51~43~24~02 *3
7  09 69 20 *5, 09 69 20 / 15 55 *1, 07 09 69 30 *2, 09 69~44~20 *3, 08~29~69~43~20 *2
8  58~39~17~35~62~30~02~35~57~49 *5, 35~17~39~57~35~02~30~62~35 *1, 68~39~17~35~62~30~02~35~69 *4
8  68~29~17~25~52~20~01~24~69 *2
9  68~49~17~05~24~46~69 50 *4, 68~39~06~14~45~68~64~50 *3, 68~39~06~14~45~68~63~40~11 *2
9  57~38~06~14~35~57 59 40 *2
A  00 39 60 / 13 53 *4, 00~06~39~66~60 / 04 64 *2, 00 39 50 12 63 *1.5, 00~27~49~50 / 13 63 *2
B  09 00 / 09~58~57~15 15~54~62~40~00 *3, 19 10 / 08~49~67~25 25~64~51~20~00 *3
B  00 09 09~48~57~15 15~54~51~00 *2
C  68~39~05~02~30~62 *2, 69 58~39~05~02~30~62 *.5, 44~25~03~01~20~41 *4, 55~35~02~10~51 *2
D  09 00 / 09~49~65~42~00 *3, 10 19 09~59~75~51~00 *2, 29 20 / 09~49~75~41~00 *2
E  68 08 00 60 / 04 44 *3, 07 00 / 07 57 / 04 44 / 00 60 *3, 57~27~15~34 34~12~01~20~51 *1
E  56~27~04~01~20~50 / 04 44 *3
F  09 00 / 09 69 / 05 45 *3, 19 10 / 08~79 / 05 45 *2, 59~39~27~20 / 05 55 *3
F  58~39~27~2b / 05 45 *2, 00 09 79 / 05 55 *1
G  68~39~05~02~30~52~54 / 34 64 *2, 68~39~05~02~30~63 33 / 63 60 *2, 68~39~05~02~30~51~64 34 *3
H  09 00 / 69 60 / 05 65 *5, 09 00 05 65 / 69 60 *2, 09 00 / 59 50 / 04~65 *2
I  09 00 *5, 05 00 *6, 39 30 / 09 69 / 00 60 *2
J  69~63~40~02 *2, 69~63~40~02 / 19 89 *4, 35~31~1a~0b *2, 45~42~20~01 *1
K  09 00 / 69 04 60 *3, 09 00 / 59 14 / 25 60 *3
L  09 00 50 *4, 37~49~28~23~11~00~11~20~61 *1, 05 00 40 *2, 16~03~00~40 *2, 08 00~60 *1
M  00 09 44 89 80 *2, 00 18 32 58 70 *2, 05 00 04~15~35 40 44~55~75~80 *3
M  00~07~18~43 43~68~79~80 *1, 00 06 43 86 80 *3, 05 00 / 04~25~32 30 / 34~55~62~60 *2
N  00 09 60 69 *3, 00 07 60 67 *3, 00~17~27 40 40~58~69 *1, 00 05 50 55 *4, 00~06~17~40~51~68 *2
O  25~03~01~20~42~44~25 *6, 39~06~03~30~63~66~39 *2, 15~04~01~20~42~45~24 *3
O  35~14~02~20~41~54~35 *3
P  09 00 / 09~49~67~54~05 *4, 19 10 / 07~29~79~75~14 *5, 00 09~49~67~45~05 *2
P  05 0c 04~25~44~31~10~01 *1, 29 20 / 06~39~79~86~54~24 *2
Q  39~06~03~30~63~66~39 / 32 60 *4, 17~39~67~43~10~01~12~31~60 *1
Q  39~06~03~30~63~66~39 / 31~42~50~71 *2
R  07 00 / 07~47~55~34~04 60 *3, 00 07~47~55~34~04 50 *3, 18 10 / 07~48~56~34~14 60 *3
R  00 07~37~55~24 50 *3
S  45~25~04~23~41~20~01 *6, 68~39~07~25~54~62~30~01 *3, 55~24~33~31~00 *2
S  79~39~17~44~62~31~00~02~24 *.5
T  09 89 / 49 40 *5, 08~79 / 49~45~30 *2, 19 99 / 49 20 *2, 09 69 / 39 30 *2
T  09 69 / 39 30 / 10 50 *.3
U  09~03~30~63~69 *1, 09~02~20~52~69 60~71 *1, 05~01~20~42~45 *4, 05~01~20~42 45 40~51 *3
V  09 30 69 *2, 05 20 45 *3, 05~03~20~43~45~55 *3
W  09 20 46 70 99 *3, 09~02~20~43~46 46~43~60~82~99 *3, 05 10 34 50 75 *1
W  05~01~10~32~34 34~31~50~72~75 *2, 09~01~10~36 36~40~60~89 *1, 08~02~20~44 44~51~70~93~98 *2
X  09 60 / 69 00 *4, 08~29~50~61 / 69 00 *2, 05 40 / 45 00 *1
Y  09 34 69 / 34 30 *3, 09 34 / 69 20 *3, 09~05~24~57 69~63~30~01 *1, 05 23 / 55 1c *1
Y  05~02~20~43 45 4b~2d~0c *1
Z  09 69 00 60 *4, 09 69 00 60 / 14 54 *1, 05 45 00 40 *1, 08~39~57~25 25~53~40~00 *.5
a  44~25~04~02~20~31~44 45 40~51 *4, 35~15~03~10~31~44~45~41~50~61 *3
a  04~25~44 40~50 / 43~23~01~20~41 *1, 45~25~03~01~20~43 45 40 *3
b  09 00 / 04~25~43~20~01 *3, 09 01~20~42~44~15~03 *3, 09~03~10~30~43~35~04 *2
b  19 02~10~30~43~34~03 *2
c  44~25~03~01~20~41 *3, 68~39~05~02~30~62 *1
d  44~25~03~01~20~43 59 50 *4, 44~25~03~01~20~42~49 49 40~51 *3, 40 49 / 44~25~03~01~20~41 *3
e  03 43~35~15~02~10~30~51 *5, 03~33~45~25~03~01~20~51 *3, 44~25~04~23 23~02~10~41 *.5
e  02 44~25~03~01~20~51 *3
f  59~39~27~20 / 05 45 *4, 58~39~27~2c / 05 45 *2, 09 00 / 09 69 / 05 45 *1
g  44~25~03~02~20~42 45 4b~2d~0c *4, 44~25~03~02~20~43 45 4c *2
g  44~25~03~01~20~43 45~4b~2d~0b~30~52 *1
h  09 00 / 03~25~43~40 *2, 09 00 03~25~43~40 *4, 02~37~28~19~00 00~14~25~43~40 *1
i  25 20 / 28 27 *4, 25 20~31 / 28 38 *2, 05 00 *1
j  35 3b~2d~0c / 38 37 *3, 35 3b~1c / 38 37 *2
k  09 00 / 45 03 40 *3, 09 00 / 03~35~34~13 13 40~51 *2, 09 00 / 69 04 60 *1
l  09 00 *5, 06 00 *5, 02~38~29~18~11~20~41 *.3, 09~01~10~31 *.3, 07~04~00 *1
m  05 00 03~14~25~33 30 33~45~55~63~60 *5, 00 05 31 55 60 *1, 05 00 / 04~25~32 30 / 34~55~62~60 *3
n  05 00 03~25~43~40 *5, 05 00 / 03~25~44~40~50 *3, 04~15~00 00~13~35~42~50~61 *2
o  25~03~01~20~42~44~25 *4, 15~04~01~20~42~45~24 *2
p  05 0c / 04~25~43~20~01 *3, 05 0c 04~25~44~31~10~01 *3, 15 1d / 03~25~44~41~21 *2
q  44~25~03~01~20~43 45 4c *3, 44~25~03~01~20~43 45 4d 6b *2, 44~25~03~01~20~43 45 4c~5b~62 *1
r  05 00 03~25~44 *5, 05 00 02~14~35~44 *4, 00~15~14~34~30~51 *1, 05 21 / 20 22~45~55 *3
s  45~25~04~23~41~20~01 *3, 68~39~07~25~54~62~30~01 *1
t  29 20 / 06 66 *4, 29~21~30~51 / 06 56 *4, 38 30 / 05 65 *3, 39 30 / 07 77 *2
u  05~01~20~42 45 40~51 *3, 05~01~20~42~45 *1
v  05 20 45 *3, 05~03~20~44~55 *2
w  05 10 34 50 75 *2, 05~01~10~32~34 34~31~50~72~75 *3
x  05 40 / 45 00 *4, 04~15~20~31~40 / 45 00 *2
y  05 22 / 45 0c *3, 05~02~20~43 45 4b~2d~0c *3, 05 23 / 55 1c *2
z  05 45 00 40 *3, 05 45 00 40 / 12 32 *1, 04~25~44~12 12~30~3b~1d~0c *1
"""

DIGIT_SHARE = 0.5
LETTER_FREQUENCIES = {  # per thousand letters, as uneven as FEMNIST's
    "A": 20, "B": 11, "C": 29, "D": 12, "E": 14, "F": 24, "G": 6, "H": 9, "I": 38, "J": 11,
    "K": 6, "L": 14, "M": 29, "N": 25, "O": 74, "P": 25, "Q": 6, "R": 15, "S": 62, "T": 34,
    "U": 46, "V": 13, "W": 15, "X": 8, "Y": 12, "Z": 8, "a": 30, "b": 15, "c": 8, "d": 30,
    "e": 73, "f": 8, "g": 10, "h": 26, "i": 8, "j": 5, "k": 8, "l": 50, "m": 8, "n": 34,
    "o": 8, "p": 7, "q": 8, "r": 42, "s": 8, "t": 54, "u": 8, "v": 8, "w": 7, "x": 8, "y": 7,
    "z": 8,
}  # fmt: skip

SAMPLES = 96  # points drawn of every character, spread evenly along its strokes
CONTROLS = 20  # control points of the longest allograph, at most
SHARPNESS = np.float32(1.2)  # grey levels an edge crosses in a pixel, of the whole range
REACH = 2  # pixels a pen point can darken on each side of the nearest one


@dataclass(frozen=True)
class Glyphs:
    """Synthetic writers in the manner of FEMNIST.

    Attributes:
        writers: how many there are; None for as many as a run asks for.
        seed: another seed, other writers.
    """

    writers: int | None
    seed: int

    @property
    def name(self) -> str:
        """Name the dataset as every result states it."""
        return "glyphs (synthetic)"

    def store(self, cache: Path, writers: int) -> WriterStore:
        """Return the store of the first `writers` writers, drawn now if it is not there."""
        source = {"dataset": "glyphs", "version": VERSION, "seed": self.seed, "writers": writers}
        return stored(cache, source, lambda: _hands(self.seed, writers))


def _hands(seed: int, writers: int) -> Iterator[Handwriting]:
    for writer in range(writers):
        labels, images = draw_writer(seed, writer)
        shard, subject = divmod(writer, SHARD)
        yield Handwriting(f"g{shard:04d}_{subject:02d}", shard, subject, images, labels)


def draw_writer(seed: int, writer: int) -> tuple[Bytes, Bytes]:
    """Return labels `[n]` and images `[n, 28, 28]` of one writer."""
    labels = draw_labels(seed, writer)
    return labels, _draw(labels, generator(seed, "glyphs hand", client=writer))


def draw_labels(seed: int, writer: int) -> Bytes:
    """Return what a writer writes: as many characters, and which, as in FEMNIST."""
    random = generator(seed, "glyphs text", client=writer)
    count = max(12, round(random.normal(227, 89)))
    digit_share = np.clip(random.normal(DIGIT_SHARE, 0.06), 0.2, 0.8)
    letters = np.array([LETTER_FREQUENCIES[letter] for letter in CHARACTERS[10:]], np.float64)
    shares = np.concatenate(
        [np.full(10, digit_share / 10), (1 - digit_share) * letters / letters.sum()]
    )
    return random.choice(CLASSES, count, p=shares).astype(np.uint8)


@dataclass(frozen=True)
class Alphabet:
    """ALLOGRAPHS compiled: a sample point is a fixed weighted sum of its control points.

    Attributes:
        label: character of each allograph, `[allographs]`.
        log_weight: logarithm of its frequency within the character, `[allographs]`.
        controls: control points, `[allographs, CONTROLS, 2]`.
        curved: weights of the sample points on curves, `[allographs, SAMPLES, CONTROLS]`.
        straight: the same on straight lines between the control points.
        position: place of each sample point along its stroke, 0 to 1, `[allographs, SAMPLES]`.
    """

    label: NDArray[np.int64]
    log_weight: NDArray[np.float64]
    controls: Floats
    curved: Floats
    straight: Floats
    position: Floats


@cached
def alphabet() -> Alphabet:
    """Compile the table, once a process."""
    labels, weights, rows = [], [], []
    for line in ALLOGRAPHS.strip().splitlines():
        for allograph in line[1:].split(","):
            strokes, weight = allograph.split("*")
            labels.append(CHARACTERS.index(line[0]))
            weights.append(float(weight))
            rows.append(_compile(strokes))
    controls, curved, straight, position = (
        np.stack(part).astype(np.float32) for part in zip(*rows, strict=True)
    )
    return Alphabet(np.array(labels), np.log(weights), controls, curved, straight, position)


Matrix = NDArray[np.float64]


def _compile(allograph: str) -> tuple[Matrix, Matrix, Matrix, Matrix]:
    """Return control points, curved and straight weights and positions of one allograph."""
    tokens: list[str] = []
    strokes = [_runs(stroke, tokens) for stroke in allograph.split("/")]
    controls = np.zeros((CONTROLS, 2))
    controls[: len(tokens)] = [(int(x), "dcba0123456789".index(y) - 4) for x, y in tokens]
    curved = [np.concatenate([_spline(run) for run in runs]) for runs in strokes]
    straight = [np.concatenate([_polygon(run) for run in runs]) for runs in strokes]
    lengths = [_distances(weights @ controls) for weights in curved]
    total = np.cumsum([length[-1] for length in lengths])
    stops = np.rint(total / total[-1] * (SAMPLES - 3 * len(strokes))).astype(int)
    samples = np.diff(stops, prepend=0) + 3  # a dot gets three as well
    parts = []
    for i, length in enumerate(lengths):
        even = np.linspace(0, 1, samples[i])
        right = np.clip(np.searchsorted(length, even * length[-1]), 1, None)
        share = (even * length[-1] - length[right - 1]) / (length[right] - length[right - 1])
        mix = np.zeros((samples[i], len(length)))
        mix[np.arange(samples[i]), right - 1] = 1 - share
        mix[np.arange(samples[i]), right] = share
        parts.append((mix @ curved[i], mix @ straight[i], even))
    return controls, *(np.concatenate(part) for part in zip(*parts, strict=True))


def _runs(stroke: str, tokens: list[str]) -> list[list[int]]:
    """Split a stroke into runs of points that one curve goes through; add its points to tokens."""
    runs: list[list[int]] = []
    for join, token in re.findall("([ ~]?)([^ ~]{2})", stroke.strip()):
        corner = join == " " and token == tokens[-1]
        if not corner:
            tokens.append(token)
        here = len(tokens) - 1
        if join == "~":
            runs[-1].append(here)
        elif join == " " and not corner:
            runs += [[here - 1, here], [here]]
        else:
            runs.append([here])
    return [run for run in runs if len(run) > 1]


def _spline(run: list[int]) -> Matrix:
    """Return the weights of points on a Catmull-Rom spline through the control points of a run."""
    knots = np.eye(CONTROLS)[run]
    before = np.concatenate([2 * knots[:1] - knots[1:2], knots[:-1]])
    after = np.concatenate([knots[1:], 2 * knots[-1:] - knots[-2:-1]])
    slopes = (after - before) / 2
    t = np.linspace(0, 1, 24, endpoint=False)[:, None, None]
    spans = (1 + 2 * t) * (1 - t) ** 2 * knots[:-1] + t * (1 - t) ** 2 * slopes[:-1]
    spans = spans + t**2 * (3 - 2 * t) * knots[1:] - t**2 * (1 - t) * slopes[1:]
    return np.concatenate([spans.swapaxes(0, 1).reshape(-1, CONTROLS), knots[-1:]])


def _polygon(run: list[int]) -> Matrix:
    """Return the same as _spline for straight lines between the control points."""
    knots = np.eye(CONTROLS)[run]
    t = np.linspace(0, 1, 24, endpoint=False)[:, None, None]
    spans = (1 - t) * knots[:-1] + t * knots[1:]
    return np.concatenate([spans.swapaxes(0, 1).reshape(-1, CONTROLS), knots[-1:]])


def _distances(points: Matrix) -> Matrix:
    """Return how far along its polygon each point stands; coinciding points stand apart a bit."""
    steps = np.hypot(*np.diff(points, axis=0).T)
    return np.concatenate([[0.0], np.cumsum(np.maximum(steps, 1e-9))])


def _draw(labels: Bytes, random: np.random.Generator) -> Bytes:
    """Draw the characters `labels` in one hand."""
    shapes = alphabet()
    n = len(labels)

    def normal(*shape: int) -> Floats:
        return random.standard_normal(shape, np.float32)

    # The writer.
    scale = np.exp(np.array([0.02, 0.05, 0.16], np.float32) + 0.1 * normal() + 0.05 * normal(3))
    width = np.exp(0.10 * normal())
    slant = 0.17 + 0.2 * normal()
    turn = 0.05 * normal()
    pen = 0.66 * np.exp(0.15 * normal())
    straightness = np.clip(0.02 + 0.15 * normal(), 0, 0.6)
    sloppiness = np.exp(0.3 * normal())
    tremor = 0.12 * np.exp(0.4 * normal())
    taper = np.clip(0.15 + 0.15 * normal(2), -0.1, 0.5)
    x_height = 0.86 + 0.1 * normal()
    habit = shapes.log_weight + 1.6 * random.gumbel(size=len(shapes.label))
    offsets = 0.4 * normal(*shapes.controls.shape)

    # The images.
    noise = random.gumbel(size=(n, len(shapes.label)))
    allowed = np.where(shapes.label == labels[:, None], habit + noise, -np.inf)
    chosen = np.argmax(allowed, axis=1)
    controls = shapes.controls[chosen] + offsets[chosen]
    controls += 0.33 * sloppiness * normal(*controls.shape)
    straightening = np.clip(straightness + 0.1 * normal(n), 0, 1)[:, None, None]
    points = shapes.curved[chosen] @ controls
    points += straightening * (shapes.straight[chosen] @ controls - points)
    x, y = points[..., 0], points[..., 1]

    lower = (labels >= 36)[:, None]
    ascender = (9 - 5 * x_height) / 4
    raised = np.where(y < 5, y * x_height, 5 * x_height + (y - 5) * ascender)
    y = np.where(lower & (y > 0), raised, y)
    group = np.digitize(labels, [10, 36])
    size = (scale[group] * np.exp(0.16 * normal(n)))[:, None]
    x = x * size * width * np.exp(0.15 * normal(n))[:, None]
    y = y * size
    lean = (slant + 0.1 * normal(n))[:, None]
    tilt = (turn + 0.07 * normal(n))[:, None]
    x, y = x + lean * y, y + tilt * x
    wave = np.linspace(0, 2 * np.pi, SAMPLES, dtype=np.float32)
    for frequency in (1.5, 4.0, 9.0):
        phase = wave * frequency + 3 * normal(n)[:, None]
        x = x + tremor / frequency**0.5 * normal(n)[:, None] * np.sin(phase)
        y = y + tremor / frequency**0.5 * normal(n)[:, None] * np.cos(phase)
    x = x - (x.max(1) + x.min(1))[:, None] / 2 + SIDE / 2 - 0.5 + 0.25 * normal(n)[:, None]
    y = -y + (y.max(1) + y.min(1))[:, None] / 2 + SIDE / 2 - 0.5 + 0.25 * normal(n)[:, None]
    position = shapes.position[chosen]
    fade = taper[0] * np.exp(-8 * position) + taper[1] * np.exp(-8 * (1 - position))
    radius = pen * np.exp(0.08 * normal(n))[:, None] * (1 - fade)
    return _ink(x, y, radius.astype(np.float32))


def _ink(x: Floats, y: Floats, radius: Floats) -> Bytes:
    """Return white images `[n, 28, 28]` with a round pen point at every (x, y) `[n, SAMPLES]`."""
    n = len(x)
    margin = REACH + 1
    wide = SIDE + 2 * margin  # what is drawn over the edge falls into the margin
    x = np.clip(x, 0, SIDE - 1)
    y = np.clip(y, 0, SIDE - 1)
    column, row = np.rint(x).astype(np.int64), np.rint(y).astype(np.int64)
    offsets = np.arange(-REACH, REACH + 1)
    across = (offsets - (x - column)[..., None]).astype(np.float32) ** 2
    down = (offsets - (y - row)[..., None]).astype(np.float32) ** 2
    distance = np.sqrt(down[..., :, None] + across[..., None, :])
    dark = np.clip((radius[..., None, None] - distance) * SHARPNESS + np.float32(0.5), 0, 1)
    start = (np.arange(n)[:, None] * wide + row + margin) * wide + column + margin
    pixel = start[..., None, None] + (offsets[:, None] * wide + offsets)
    canvas = np.zeros(n * wide * wide, np.float32)
    np.maximum.at(canvas, pixel.ravel(), dark.ravel())
    page = canvas.reshape(n, wide, wide)[:, margin:-margin, margin:-margin]
    return (255 - np.rint(255 * page)).astype(np.uint8)

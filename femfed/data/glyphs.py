"""Synthetic writers: FEMNIST's 62 characters drawn as pen strokes, offline and deterministic.

A writer is a pure function of (seed, writer): neither the number of writers nor the process that
draws them matters. Each has a hand of their own (slant, pen, proportions, roundness, tremor, the
letter shapes they were taught), keeps to it, and scatters around it from image to image.

The shapes stand in ALLOGRAPHS, written by hand: nothing is taken from a font and no image of
FEMNIST is in here. Sizes, position, greys, frequencies and the choice of shapes follow what was
measured and seen on 28 of its writers.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache as cached
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from femfed import UserError
from femfed.data.source import Dataset
from femfed.data.store import (
    CHARACTERS,
    CLASSES,
    Bytes,
    Handwriting,
    OnWriter,
    WriterStore,
    check_room,
    stored,
)
from femfed.seeds import generator

VERSION = 1  # raise it when a writer changes: stores drawn before are then drawn again
SIDE = 28  # pixels
MOST_WRITERS = 1_000_000
MEAN_IMAGES = 227  # of a writer
IMAGE_BYTES = SIDE * SIDE + 1  # in a store, with its label
SHARD = 100  # writers that share a shard number
CAPITALS, SMALL = 10, 36  # labels the capitals and the small letters begin at

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

# How each character may be written: a line is the character and its allographs, divided by commas,
# each with its frequency after *.
#
# A point is two digits, x and y: x grows to the right, y upwards from the baseline 0 over the
# x-height 5 to the capitals' height 9; a, b, c, d are 1 to 4 below the baseline. A blank joins two
# points by a straight line, ~ by a curve, a point twice over is a corner between two curves and /
# lifts the pen. So `07~39~67~44~00 60` is a 2: over the top and down to the left in one curve, then
# straight to the right.
ALLOGRAPHS = """
0  37~06~03~30~63~55~37 *5, 28~06~03~30~63~66~48~28 *3, 48~28~06~02~20~52~65~58~38 *2
0  26~04~02~20~43~46~26 *2, 37~06~03~30~63~66~37 / 11 57 *1
1  39 30 *9, 39~34~40 *1, 17 39 30 *1.5, 17 39 30 / 10 50 *.3, 39~44~30 *1
2  07~39~67~44~00 60 *5, 07~29~57~44~11~01~12~30~61 *3, 08~39~57~00 60~71 *2
2  07~39~67~44~00~21~60 *2, 06~18~48~45~10 10~01~12~31~70 *2, 18~39~57~34~00 00~22~40~71 *2
3  08~39~67~25 25~54~62~30~01 *5, 09 69 35 35~64~51~20~01 *1, 08~39~67~36~25~36~53~30~01 *2
3  07~29~58~46~25 25~54~52~20~01 *3
4  19 04 64 / 59 50 *4, 50 59 03 63 *2, 19~15~04 64 / 69 40 *3, 09~05~24~57 69 50 *2
4  08 04~24~56 / 59 50 *2, 17 14 64 / 49 40 *2, 18 03 73 / 58 40 *2, 28~14~03~33~63 / 59 40 *1.5
5  69 19 15~46~63~40~01 *4, 19 05~46~63~30~01 / 19 79 *4, 69~29~16~45~63~30~01 *.7
5  79 29 15~35~53~30~00 *1, 28 15~45~52~20~00 / 28~99 *2, 18 15~44~42~20~00 / 18 68 *2
6  59~24~02~30~52~34~12 *3, 49~13~01~20~52~34~12 *2, 38~05~02~20~51~43~24~02 *3
6  69~37~13~02~20~52~44~13 *3, 49~26~02~20~61~53~22 *2
7  09 69 20 *5, 09 69 20 / 15 55 *1, 07 09 69 30 *2, 09 69~44~20 *3, 08~29~69~43~20 *2
8  58~39~17~35~62~30~02~35~57~49 *4, 35~17~39~57~35~02~30~62~35 *1, 68~39~17~35~62~30~02~35~69 *3
8  68~29~17~25~52~20~01~24~69 *2, 68~38~17~45~52~20~01~45~79 *2, 57~38~17~35~52~20~01~35~46~58 *2
8  58~39~18~26~44~42~20~01~13~36~79 *3, 68~38~18~26~43~31~10~11~34~68 *2
8  79~39~18~16~34~32~20~11~33~57~48 *2, 89~38~17~25~42~20~01~24~57~48 *2
9  68~49~17~05~24~46~69 50 *3, 68~39~06~14~45~68~64~50 *3, 68~39~06~14~45~68~63~40~11 *1.5
9  57~38~06~14~35~57 59 40 *2, 67~39~17~25~46~78 30 *4, 68~48~17~16~47~68~54~30 *3
9  79~39~17~26~47~68 68 40 *2, 79~28~16~25~46~67 67~64~40 *2
A  00 39 60 / 13 53 *3, 00~06~39~66~60 / 04 64 *2, 00 39 50 12 63 *1.5, 00~27~49~50 / 13 63 *2
A  00 46 70 / 12 72 *2, 00~34~55~70 / 12 63 *2, 00~17~38~57~50 / 04 54 *2, 10 49 60 / 03 73 *2
A  00 49 70 62~11 *1, 00 36 60 60~22~53 *1, 00~17~48~66~60 60~53~14 *1
B  09 00 / 09~58~57~15 15~54~62~40~00 *3, 19 10 / 08~49~67~25 25~64~51~20~00 *3
B  00 09 09~48~57~15 15~54~51~00 *2, 28 10 / 07~29~79~77~25 25~65~61~30~00 *2
B  18 10 / 07~38~57~25 25~53~51~20~00 *2, 08 00 08~48~46~14 14~53~40~00 *2
B  29 20 / 08~59~78~36~25~56~73~41~10~02 *2
C  68~39~05~02~30~62 *2, 69 58~39~05~02~30~62 *.5, 44~25~03~01~20~41 *4, 55~35~02~10~51 *2
C  34 45~25~03~01~20~51 *1.5, 46~58~39~05~02~30~62 *1, 06 03~10~41 *1, 54~25~03~01~30~61 *1.5
D  09 00 / 09~49~65~42~00 *3, 10 19 09~59~75~51~00 *2, 29 20 / 09~49~75~41~00 *2
D  27 21 / 07~39~87~63~30~00 *2, 17 11 / 08~48~85~42~01 *2, 08 01 01~30~64~47~08 *1.5
D  08~01 / 08~38~64~41~00 *1
E  68 08 00 60 / 04 44 *3, 07 00 / 07 57 / 04 44 / 00 60 *3, 57~27~15~34 34~12~01~20~51 *1
E  56~27~04~01~20~50 / 04 44 *3
F  09 00 / 09 69 / 05 45 *3, 19 10 / 08~79 / 05 45 *2, 59~39~27~20 / 05 55 *3
F  58~39~27~2b / 05 45 *2, 00 09 79 / 05 55 *1, 57~48~26~10 / 03~64 *3, 68~49~37~20 10 / 14~65 *1
F  08~48~67 / 28 10 / 14~54 *2
G  68~39~05~02~30~52~54 / 34 64 *2, 68~39~05~02~30~63 33 / 63 60 *2, 68~39~05~02~30~51~64 34 *3
H  09 00 / 69 60 / 05 65 *4, 09 00 05 65 / 69 60 *2, 09 00 / 59 50 / 04~65 *2
H  08 00 / 68 60 / 04 64 *2, 08 00 / 48 40 / 04 64 *2, 09 10 / 59 60 / 04 75 *1
I  09 00 *5, 05 00 *6, 39 30 / 09 69 / 00 60 *2
J  69~63~40~02 *2, 69~63~40~02 / 19 89 *4, 35~31~1a~0b *2, 45~42~20~01 *1
K  09 00 / 69 04 60 *3, 09 00 / 59 14 / 25 60 *3
L  09 00 50 *4, 37~49~28~23~11~00~11~20~61 *1, 05 00 40 *2, 16~03~00~40 *2, 08 00~60 *1
M  00 09 44 89 80 *2, 00 18 32 58 70 *2, 05 00 04~15~35 40 44~55~75~80 *3
M  00~07~18~43 43~68~79~80 *1, 00 06 43 86 80 *3, 05 00 / 04~25~32 30 / 34~55~62~60 *2
N  00 09 60 69 *2, 00 07 60 67 *2, 00~17~27 40 40~58~69 *1, 00 05 50 55 *3, 00~06~17~40~51~68 *2
N  00 04 60 65 *3, 00~24~31~40~75 *2, 02~15 40~51~78 *2, 00~06~26~30~50~57 *2, 00~14~23~41~54 *2
N  02 14 40~51~68 *2, 03~14~30~50~78 *2
O  25~03~01~20~42~44~25 *6, 37~05~03~30~63~55~37 *1, 15~04~01~20~42~45~24 *3
O  35~14~02~20~41~54~35 *3, 35~14~01~30~52~54~35 *2
P  09 00 / 09~49~67~54~05 *4, 19 10 / 07~29~79~75~14 *4, 00 09~49~67~45~05 *2
P  05 0c 04~25~44~31~10~01 *1, 29 20 / 06~39~79~86~54~24 *2, 20 28 / 16~29~58~55~24 *2
P  10~27~48~57~45~15 *2, 30 36~17~18~49~78~56~35 *1.5
Q  39~06~03~30~63~66~39 / 32 60 *4, 17~39~67~43~10~01~12~31~60 *1
Q  39~06~03~30~63~66~39 / 31~42~50~71 *2
R  07 00 / 07~47~55~34~04 60 *3, 00 07~47~55~34~04 50 *2, 18 10 / 07~48~56~34~14 60 *3
R  00 07~37~55~24 50 *2, 10 16 / 05~18~47~55~24 24~41~70 *3, 20 05~08~58~65~23 60 *2
R  00 17 / 07~38~66~24 24~41~60 *2, 00~17~47~54~14 14 40 *1.5, 00~05~28~57~50 / 04 54 *1.5
S  45~25~04~23~41~20~01 *6, 68~39~07~25~54~62~30~01 *3, 54~35~14~33~31~00 *3
S  79~39~17~44~62~31~00~02~24 *.5, 67~48~27~25~44~42~20~00 *3, 57~38~17~35~43~31~00 *4
S  64~45~25~14~33~42~31~00 *3, 56~37~16~14~43~42~20~01 *3
T  09 89 / 49 40 *4, 08~79 / 49~45~30 *2, 19 99 / 49 20 *2, 07 89 / 49 30 *3
T  07 88 / 49 20 *2, 18 98 / 49 30 *2, 09 69 / 39 30 / 10 50 *.3
T  17 09~89 / 48 20 *1.5, 07~48~89 / 59 20 *2
U  09~03~30~63~69 *1, 09~02~20~52~69 60~71 *1, 05~01~20~42~45 *4, 05~01~20~42 45 40~51 *3
V  09 30 69 *2, 05 20 45 *3, 05~03~20~43~45~55 *3, 05~02~10~21~45~65 *2, 07 20 47 *1
W  09 20 46 70 99 *3, 09~02~20~43~46 46~43~60~82~99 *3, 05 10 34 50 75 *1
W  05~01~10~32~34 34~31~50~72~75 *2, 09~01~10~36 36~40~60~89 *1, 08~02~20~44 44~51~70~93~98 *2
X  09 60 / 69 00 *4, 08~29~50~61 / 69 00 *2, 05 40 / 45 00 *1
Y  09 34 69 / 34 30 *3, 09 34 / 69 20 *3, 09~05~24~57 69~63~30~01 *1, 05 23 / 55 1c *1
Y  05~02~20~43 45 4b~2d~0c *1
Z  09 69 00 60 *4, 09 69 00 60 / 14 54 *1, 05 45 00 40 *1, 08~39~57~25 25~53~40~00 *.5
a  44~25~04~02~20~31~44 45 40~51 *3, 35~15~03~10~31~44~45~41~50~61 *3
a  04~25~44 40~50 / 43~23~01~20~41 *.7, 45~25~03~01~20~43 45 40 *3
a  44~24~02~00~30~43~44~41~60~71 *3, 34~14~02~10~30~42 43 51~72 *2, 54~24~02~10~32~54 54~50~71 *2
b  09 00 / 04~25~43~20~01 *3, 09 01~20~42~44~15~03 *3, 09~03~10~30~43~35~04 *2
b  19 02~10~30~43~34~03 *2, 09 00 / 02~23~42~30~00 *2, 09 00~30~42~24~01 *2
c  44~25~03~01~20~41 *3, 68~39~05~02~30~62 *1
d  44~25~03~01~20~43 59 50 *4, 44~25~03~01~20~42~49 49 40~51 *3
d  40 49 / 44~25~03~01~20~41 *3, 59 50 / 52~33~13~01~20~51 *3, 43~24~02~10~31~52 39 40 *1.5
d  39 40 / 42~23~02~10~30~51 *1.5
e  03 43~35~15~02~10~30~51 *5, 03~33~45~25~03~01~20~51 *3, 44~25~04~23 23~02~10~41 *.5
e  02 44~25~03~01~20~51 *3, 13~54~35~03~01~30~61 *2
f  59~39~27~20 / 05 45 *4, 58~39~27~2c / 05 45 *2, 09 00 / 09 69 / 05 45 *1
g  44~25~03~02~20~42 45 4b~2d~0c *4, 44~25~03~02~20~43 45 4c *2
g  44~25~03~01~20~43 45~4b~2d~0b~30~52 *1
h  09 00 / 03~24~43~40 *2, 09 00 03~25~43~40 *4, 09 00 02~13~33~40 *3, 09 00 01~13~33~40~51 *3
h  02~37~28~19~00 00~14~25~43~40 *1, 09 00 01~12~22~30~60 *1.5
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
r  14 20 / 05~23~35~45 *2, 04 21 20 22~35~55 *2, 05~14~11 10 13~35~54 *2
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
LETTER_FREQUENCIES = {  # against each other, about as uneven as FEMNIST's
    "A": 20, "B": 11, "C": 29, "D": 12, "E": 14, "F": 24, "G": 6, "H": 9, "I": 38, "J": 11,
    "K": 6, "L": 14, "M": 29, "N": 25, "O": 74, "P": 25, "Q": 6, "R": 15, "S": 62, "T": 34,
    "U": 46, "V": 13, "W": 15, "X": 8, "Y": 12, "Z": 8, "a": 30, "b": 15, "c": 8, "d": 30,
    "e": 73, "f": 8, "g": 10, "h": 26, "i": 8, "j": 5, "k": 8, "l": 50, "m": 8, "n": 34,
    "o": 8, "p": 7, "q": 8, "r": 42, "s": 8, "t": 54, "u": 8, "v": 8, "w": 7, "x": 8, "y": 7,
    "z": 8,
}  # fmt: skip

HEIGHTS = "dcba0123456789"  # what y may be, from the lowest

STATURE = {  # height against the box above, where writers depart from it
    "0": 0.9, "1": 0.87, "2": 0.88, "3": 0.9, "4": 1.05, "5": 0.9, "6": 1.05, "7": 0.95,
    "8": 1.05, "9": 1.1, "A": 0.95, "C": 0.95, "E": 0.85, "I": 0.87, "L": 0.93, "M": 0.85,
    "N": 0.92, "O": 0.93, "P": 1.1, "R": 0.85, "V": 0.9, "W": 1.2, "b": 0.9, "f": 0.9, "j": 0.8,
    "k": 0.85, "l": 0.8, "p": 0.9, "q": 1.1, "t": 0.95,
}  # fmt: skip

SAMPLES = 96  # points drawn of every character, spread evenly along its strokes
CONTROLS = 20  # control points of the longest allograph, at most
EDGE = np.float32(1.35)  # pixels from white to black across the edge of a stroke
REACH = 2  # pixels a pen point can darken on each side of the nearest one


@dataclass(frozen=True)
class Glyphs(Dataset):
    """Synthetic writers in the manner of FEMNIST; another `seed`, other writers.

    Attributes:
        writers: how many there are; None for as many as a run asks for.
    """

    writers: int | None

    name = "glyphs (synthetic)"
    variant = "synthetic writers drawn as pen strokes"

    def convert(self, cache: Path, writers: int, on_writer: OnWriter | None = None) -> WriterStore:
        """Return the store of `self.writers` writers, or of as many as are wanted."""
        count = self.writers_made(writers)
        source = {"dataset": "glyphs", "version": VERSION, "seed": self.seed, "writers": count}

        def hands() -> Iterator[Handwriting]:
            check_room(cache, count * MEAN_IMAGES * IMAGE_BYTES)
            return _hands(self.seed, count)

        return stored(cache, source, hands, on_writer)

    def writers_made(self, writers: int) -> int:
        """Return `self.writers`, or as many as are wanted."""
        count = writers if self.writers is None else self.writers
        if count > MOST_WRITERS:
            asked = "clients and evaluate.unseen_fraction ask for"
            raise UserError(
                f"{f'dataset.writers={self.writers}:' if self.writers else asked} {count:,} "
                f"writers; expected at most {MOST_WRITERS:,}; lower them"
            )
        return count


def _hands(seed: int, writers: int) -> Iterator[Handwriting]:
    for writer in range(writers):
        labels, images = draw_writer(seed, writer)
        shard, subject = divmod(writer, SHARD)
        yield Handwriting(f"g{shard:04d}_{subject:02d}", shard, subject, images, labels)


def draw_writer(seed: int, writer: int) -> tuple[Bytes, Bytes]:
    """Return labels `[n]` and images `[n, 28, 28]` of one writer."""
    labels = draw_labels(seed, writer)
    hand = _hand(generator(seed, "glyphs hand", client=writer))
    return labels, _draw(labels, hand, generator(seed, "glyphs images", client=writer))


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
        extent: its height or width, the greater, against the capitals' height, `[allographs]`.
        controls: control points, `[allographs, CONTROLS, 2]`.
        straight: weights of the sample points on straight lines from control point to control
            point, `[allographs, SAMPLES, CONTROLS]`.
        bend: what to add to them for curves, `[allographs, SAMPLES, CONTROLS]`.
        position: place of each sample point along its stroke, 0 to 1, `[allographs, SAMPLES]`.
    """

    label: NDArray[np.int64]
    log_weight: NDArray[np.float64]
    extent: Floats
    controls: Floats
    straight: Floats
    bend: Floats
    position: Floats


@cached
def alphabet() -> Alphabet:
    """Compile the table, once a process."""
    labels, weights, compiled = [], [], []
    for line in ALLOGRAPHS.strip().splitlines():
        for allograph in line[1:].split(","):
            strokes, weight = allograph.split("*")
            labels.append(CHARACTERS.index(line[0]))
            weights.append(float(weight))
            compiled.append(_compile(strokes))
    controls, straight, bend, position = (
        np.stack(part).astype(np.float32) for part in zip(*compiled, strict=True)
    )
    extent = np.ptp((straight + bend) @ controls, axis=1).max(axis=1) / 9
    return Alphabet(np.array(labels), np.log(weights), extent, controls, straight, bend, position)


def _compile(allograph: str) -> tuple[Doubles, Doubles, Doubles, Doubles]:
    """Return control points, straight and bend weights and positions of one allograph."""
    points: list[tuple[int, int]] = []
    strokes = [
        np.concatenate([_through(run) for run in _runs(stroke, points)], axis=1)
        for stroke in allograph.split("/")
    ]
    controls = np.zeros((CONTROLS, 2))
    controls[: len(points)] = points
    # Steps of no length, where two curves meet, would have no inverse.
    steps = [np.diff(stroke.sum(axis=0) @ controls, axis=0) for stroke in strokes]
    along = [np.cumsum([0, *np.maximum(np.hypot(*step.T), 1e-9)]) for step in steps]
    ends = np.cumsum([lengths[-1] for lengths in along])
    last = np.rint(ends / ends[-1] * (SAMPLES - 3 * len(strokes))).astype(int)
    samples = np.diff(last, prepend=0) + 3  # a dot gets three as well
    positions = [np.linspace(0, 1, count) for count in samples]
    even = [
        _between(stroke, np.interp(position * lengths[-1], lengths, np.arange(len(lengths))))
        for stroke, lengths, position in zip(strokes, along, positions, strict=True)
    ]
    straight, bend = np.concatenate(even, axis=1)
    return controls, straight, bend, np.concatenate(positions)


def _runs(stroke: str, points: list[tuple[int, int]]) -> list[list[int]]:
    """Add a stroke's points to `points` and split them into runs that one curve goes through."""
    runs: list[list[int]] = []
    before = ""
    for join, token in re.findall("([ ~]?)([^ ~]{2})", stroke.strip()):
        corner = join == " " and token == before
        if not corner:
            points.append((int(token[0]), HEIGHTS.index(token[1]) - HEIGHTS.index("0")))
        here, before = len(points) - 1, token
        if join == "~":
            runs[-1].append(here)
        elif join == " " and not corner:
            runs += [[here - 1, here], [here]]
        else:
            runs.append([here])
    return [run for run in runs if len(run) > 1]


def _through(run: list[int]) -> Doubles:
    """Return weights of many points on a Catmull-Rom spline through the control points of a run.

    The first of the two, `[2, points, CONTROLS]`, are of points on the straight lines; with the
    second added to them, of points on the spline.
    """
    knots = np.eye(CONTROLS)[run]
    beyond = np.concatenate([2 * knots[:1] - knots[1:2], knots, 2 * knots[-1:] - knots[-2:-1]])
    slopes = (beyond[2:] - beyond[:-2]) / 2
    chords = knots[1:] - knots[:-1]
    t = np.linspace(0, 1, 24)[:, None, None]
    straight = knots[:-1] + t * chords
    bend = t * (1 - t) * ((1 - t) * (slopes[:-1] - chords) - t * (slopes[1:] - chords))
    return np.stack([straight, bend]).swapaxes(1, 2).reshape(2, -1, CONTROLS)


def _between(weights: Doubles, at: Doubles) -> Doubles:
    """Interpolate `[2, points, CONTROLS]` at fractional points."""
    left = np.minimum(at.astype(int), weights.shape[1] - 2)
    share = (at - left)[:, None]
    mixed: Doubles = (1 - share) * weights[:, left] + share * weights[:, left + 1]
    return mixed


@dataclass(frozen=True)
class Hand:
    """How one writer writes: what stays the same from image to image.

    Lengths are pixels; a character's box is 9 units high, a unit about one pixel.

    Attributes:
        size: pixels per unit of digits, capitals and small letters, `[3]`.
        width: widths against heights.
        x_height: height of small letters without ascenders against the table's 5.
        slant: how far a point one unit up moves to the right.
        climb: how far a point one unit to the right moves up.
        pen: radius of the pen.
        fade: share of the radius lost where a stroke begins and where it ends, `[2]`.
        curved: 1 for curves, 0 for straight lines between the control points.
        sloppiness: how far images of one character scatter, 1 on average.
        tremor: amplitude of the pen's waver.
        preference: log-weight of each allograph, `[allographs]`.
        habit: how each allograph's control points depart from the table, in ninths of its
            extent, `[allographs, CONTROLS, 2]`.
    """

    size: Floats
    width: float
    x_height: float
    slant: float
    climb: float
    pen: float
    fade: Floats
    curved: float
    sloppiness: float
    tremor: float
    preference: NDArray[np.float64]
    habit: Floats


def _hand(random: np.random.Generator) -> Hand:
    shapes = alphabet()
    typical = np.array([1.02, 1.07, 1.22], np.float32)
    return Hand(
        size=typical * np.exp(_normal(random, 0.10) + _normal(random, 0.05, 3)),
        width=math.exp(random.normal(0, 0.10)),
        x_height=random.normal(0.82, 0.12),
        slant=random.normal(0.17, 0.20),
        climb=random.normal(0, 0.05),
        pen=math.exp(random.normal(-0.39, 0.15)),
        fade=np.clip(0.15 + _normal(random, 0.15, 2), -0.1, 0.5),
        curved=min(1.0, random.normal(0.98, 0.12)),
        sloppiness=math.exp(random.normal(0, 0.3)),
        tremor=math.exp(random.normal(-2.3, 0.4)),
        preference=shapes.log_weight + 1.6 * random.gumbel(size=len(shapes.label)),
        habit=_normal(random, 0.45, *shapes.controls.shape),
    )


def _normal(random: np.random.Generator, scale: float, *shape: int) -> Floats:
    return random.standard_normal(shape, np.float32) * np.float32(scale)


def _draw(labels: Bytes, hand: Hand, random: np.random.Generator) -> Bytes:
    """Draw each of `labels` once in a writer's hand, as `[n, 28, 28]`."""
    shapes = alphabet()
    chosen = _choose(labels, hand, random)
    x, y = _trace(chosen, hand, random)
    x, y = _shape(labels, x, y, hand, random)
    x, y = _waver(x, y, hand, random)
    x, y = _fit(x, random), _fit(-y, random)
    position = shapes.position[chosen]
    faded = hand.fade[0] * np.exp(-8 * position) + hand.fade[1] * np.exp(8 * position - 8)
    pressure = np.exp(_normal(random, 0.08, len(labels), 1))
    return _ink(x, y, hand.pen * pressure * (1 - faded))


def _choose(labels: Bytes, hand: Hand, random: np.random.Generator) -> NDArray[np.int64]:
    """Choose an allograph for each label: mostly the one the writer prefers."""
    shapes = alphabet()
    chance = hand.preference + random.gumbel(size=(len(labels), len(shapes.label)))
    possible = shapes.label == labels[:, None]
    chosen: NDArray[np.int64] = np.where(possible, chance, -np.inf).argmax(axis=1)
    return chosen


def _trace(
    chosen: NDArray[np.int64], hand: Hand, random: np.random.Generator
) -> tuple[Floats, Floats]:
    """Return x and y of the sample points, `[n, SAMPLES]`, in units of the table."""
    shapes = alphabet()
    controls = shapes.controls[chosen]
    scatter = hand.habit[chosen] + _normal(random, 0.36 * hand.sloppiness, *controls.shape)
    controls = controls + shapes.extent[chosen, None, None] * scatter
    curved = np.clip(hand.curved + _normal(random, 0.1, len(chosen), 1, 1), 0, 1)
    points = shapes.straight[chosen] @ controls + curved * (shapes.bend[chosen] @ controls)
    return points[..., 0], points[..., 1]


def _shape(
    labels: Bytes, x: Floats, y: Floats, hand: Hand, random: np.random.Generator
) -> tuple[Floats, Floats]:
    """Bend each character and give it the writer's proportions: from units to pixels."""
    n = len(labels)
    # Bent as a whole, by a quadratic of the place in the box that is zero at its centre.
    across, up = (x - 3) / 4, (y - 4) / 4
    terms = np.stack([across * across, across * up, up * up])
    bend = _normal(random, 0.32 * hand.sloppiness, 2, 3, n, 1)
    x, y = x + (bend[0] * terms).sum(axis=0), y + (bend[1] * terms).sum(axis=0)
    # A lower x-height leaves a small letter's ascender its height.
    small = (labels >= SMALL)[:, None] & (y > 0)
    middle = 5 * hand.x_height
    raised = np.where(y < 5, y * hand.x_height, middle + (y - 5) * (9 - middle) / 4)
    y = np.where(small, raised, y)

    stature = np.array([STATURE.get(character, 1) for character in CHARACTERS], np.float32)
    size = hand.size[np.digitize(labels, [CAPITALS, SMALL])] * np.exp(_normal(random, 0.16, n))
    x = x * (size * hand.width * np.exp(_normal(random, 0.15, n)))[:, None]
    y = y * (size * stature[labels])[:, None]
    slant = hand.slant + _normal(random, 0.10, n, 1)
    climb = hand.climb + _normal(random, 0.07, n, 1)
    return x + slant * y, y + climb * (x + slant * y)


def _waver(x: Floats, y: Floats, hand: Hand, random: np.random.Generator) -> tuple[Floats, Floats]:
    """Let the pen waver on its way, in two slow waves."""
    n, samples = x.shape
    way = np.linspace(0, 2 * np.pi, samples, dtype=np.float32)
    for waves in (1.5, 4.0):
        phase = waves * way + _normal(random, 3, n, 1)
        sway = _normal(random, hand.tremor / waves**0.5, 2, n, 1)
        x, y = x + sway[0] * np.sin(phase), y + sway[1] * np.cos(phase)
    return x, y


def _fit(coordinate: Floats, random: np.random.Generator) -> Floats:
    """Move each character's box to the middle of the image, as FEMNIST's are, or nearly."""
    low = coordinate.min(axis=1, keepdims=True)
    extent = coordinate.max(axis=1, keepdims=True) - low
    shrink = np.minimum(1, (SIDE - 4) / extent)  # only the rare giant
    start = (SIDE - 1 - extent * shrink) / 2 + _normal(random, 0.25, len(coordinate), 1)
    fitted: Floats = start + (coordinate - low) * shrink
    return fitted


def _ink(x: Floats, y: Floats, radius: Floats) -> Bytes:
    """Return white images `[n, 28, 28]` with a round pen point at every (x, y) `[n, SAMPLES]`."""
    n = len(x)
    wide = SIDE + 2 * REACH  # a margin around the image
    column, row = (np.clip(np.rint(at), 0, SIDE - 1).astype(np.int64) for at in (x, y))
    near = np.arange(-REACH, REACH + 1)
    across = near.astype(np.float32) - (x - column).astype(np.float32)[..., None]
    down = near.astype(np.float32) - (y - row).astype(np.float32)[..., None]
    distance = np.sqrt(down[..., :, None] ** 2 + across[..., None, :] ** 2)
    depth = np.clip((radius[..., None, None] - distance) / EDGE + np.float32(0.5), 0, 1)
    dark = depth * depth * (3 - 2 * depth)
    corner = (np.arange(n)[:, None] * wide + row + REACH) * wide + column + REACH
    pixels = corner[..., None, None] + (near[:, None] * wide + near)
    canvas = np.zeros(n * wide * wide, np.float32)
    np.maximum.at(canvas, pixels.ravel(), dark.ravel())
    image = canvas.reshape(n, wide, wide)[:, REACH:-REACH, REACH:-REACH]
    return (255 - np.rint(255 * image)).astype(np.uint8)

"""Every random draw of a run comes from (seed, purpose, round, client)."""

import zlib

import numpy as np


def generator(seed: int, purpose: str, round: int = 0, client: int = 0) -> np.random.Generator:
    """Return the random generator of one purpose, round and client.

    Two draws share a generator only if all four coordinates are equal, so what is drawn depends
    neither on which worker draws nor on what was drawn before.
    """
    coordinates = (seed, zlib.crc32(purpose.encode()), round, client)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(coordinates)))

"""What all contestants share: the work, and the lines they exchange with the driver.

A contestant is `SCRIPT MODEL CLIENTS CORES [SETTING]`, run in an environment of its own where only
NumPy and the standard library are certain. It trains a round for every line it reads, answers it
with a line of JSON, and ends when there are no more. Its start-up is the time to its first answer.
"""

import importlib.metadata
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

EXAMPLES = 180  # images a client: nine batches of twenty
BATCH = 20
CLASSES = 62
LEARNING_RATE = 0.01
PARAMETERS = {"cnn": 1_206_590, "leaf_cnn": 6_603_710}


def arguments() -> tuple[str, int, int, str]:
    """Return model, clients, cores and setting of this contestant."""
    model, clients, cores = sys.argv[1:4]
    return model, int(clients), int(cores), "".join(sys.argv[4:])


def writers(clients: int) -> list[tuple[Any, Any]]:
    """Return images `[180, 28, 28]` in 0..1, float32, and labels `[180]` of every client: noise."""
    draw = np.random.default_rng(0)
    return [
        (
            draw.integers(256, size=(EXAMPLES, 28, 28), dtype=np.uint8).astype(np.float32) / 255,
            draw.integers(CLASSES, size=EXAMPLES),
        )
        for _ in range(clients)
    ]


def check(model: str, parameters: int) -> None:
    """Refuse to compare with another model."""
    assert parameters == PARAMETERS[model], f"{model} has {parameters} parameters"


def rounds(*packages: str) -> Iterator[int]:
    """Yield the number of every round that is asked for; asking for the next says it is done.

    Args:
        packages: of which the answers give the versions.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log
    versions = {name: importlib.metadata.version(name) for name in packages}
    for number, _ in enumerate(sys.stdin, start=1):
        yield number
        print(json.dumps({"round": number, "versions": versions}), file=answers, flush=True)

"""What one core makes of a client's local step, next to what it can do at most.

    python -m benchmarks.step

Trains writers of 180 images in batches of twenty in this single-threaded process, with both CNNs
and both precisions (where the CPU has bfloat16 products), in turns with a bare matrix product,
whose speed is the core's peak. A turn counts the fastest of three calls of each; printed are
medians over the turns, and the share of the peak with its range. Evaluation is the forward pass
alone, in batches of 512.

Operations are counted on paper: two per multiplication of the convolutions and matrix products,
forward, gradient of the weights and gradient of the inputs (not of the images). How a product is
computed does not change the count.
"""

import argparse
import itertools
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from benchmarks.bench import EXAMPLES, LOCAL, MODELS, available_precisions
from femfed.client import LocalTraining
from femfed.data.store import Writer
from femfed.strategies.fedavg import FedAvg

BATCH = 512  # of the evaluation
SIDE = 1536  # of the matrices


def operations(model: keras.Sequential) -> tuple[int, int]:
    """Return the operations of an image's training step and of its forward pass."""
    forward = []
    for layer in model.layers:
        if layer.weights:
            places = int(np.prod(layer.output.shape[1:-1]))  # one for a dense layer
            forward.append(2 * places * int(np.prod(layer.kernel.shape)))
    return 3 * sum(forward) - forward[0], sum(forward)


def noise(train: int, test: int) -> Writer:
    """Return a writer of noise."""
    draw, n = np.random.default_rng(0), train + test
    images = draw.integers(256, size=(n, 28, 28), dtype=np.uint8)
    labels = draw.integers(62, size=n, dtype=np.uint8)
    rows = np.arange(n, dtype=np.int32)
    return Writer("noise", 0, 0, images, labels, rows[:train], rows[train:])


def product(precision: str) -> Callable[[], Any]:
    """Return a function that multiplies two large matrices."""
    draw = np.random.default_rng(0)
    one, other = (
        tf.cast(draw.normal(size=(SIDE, SIDE)).astype(np.float32), precision) for _ in range(2)
    )
    return lambda: tf.matmul(one, other).numpy()


def seconds(work: Callable[[], Any], times: int = 1) -> float:
    """Return the seconds of the fastest of some calls."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args()
    writer, precisions = noise(EXAMPLES, BATCH), available_precisions()
    cases = list(itertools.product(options.models, precisions))
    trainings = {
        (name, precision): LocalTraining(MODELS[name], FedAvg(), LOCAL, 0, precision)
        for name, precision in cases
    }
    products = {precision: product(precision) for precision in precisions}
    peaks: dict[str, list[float]] = {precision: [] for precision in precisions}
    train: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
    evaluate: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
    for turn in range(1 + options.turns):
        for precision in precisions:
            peaks[precision].append(2 * SIDE**3 / seconds(products[precision], 3))
        for case, training in trainings.items():
            train[case].append(seconds(lambda t=training, n=turn: t.train(writer, n, 0), 3))  # type: ignore[misc]
            evaluate[case].append(seconds(lambda t=training: t.evaluate(writer, writer.test), 3))  # type: ignore[misc]

    print(f"one core, {EXAMPLES} images a client, batch {LOCAL.batch_size}, {options.turns} turns")
    for precision in precisions:
        peak = np.array(peaks[precision][1:]) / 1e9  # the first turn traces and warms up
        print(
            f"peak of a {precision} product of {SIDE} x {SIDE}: {np.median(peak):.0f} GFLOP/s "
            f"({peak.min():.0f}-{peak.max():.0f})"
        )
    print(
        f"{'':>21}operations  {'training':^46}  {'evaluation, batch 512':^30}\n"
        "model     precision  an image   ms/batch  images/s  GFLOP/s  of the peak     "
        "ms/batch  images/s  of the peak"
    )
    for case in cases:
        step, forward = operations(trainings[case].model)
        peak = np.array(peaks[case[1]][1:])
        rate = EXAMPLES / np.array(train[case][1:])
        evaluated = BATCH / np.array(evaluate[case][1:])
        share, images = rate * step / peak, float(np.median(rate))
        milliseconds = 1e3 * LOCAL.batch_size / images
        print(
            f"{case[0]:<9} {case[1]:<9} {step / 1e6:>7.1f} M  "
            f"{milliseconds:>8.2f}  {images:>8.0f}  {images * step / 1e9:>7.0f}  "
            f"{np.median(share):>4.0%} ({share.min():.0%}-{share.max():.0%})  "
            f"{1e3 * BATCH / np.median(evaluated):>10.1f}  {np.median(evaluated):>8.0f}  "
            f"{np.median(evaluated * forward / peak):>8.0%}"
        )


if __name__ == "__main__":
    main()

"""FedTrimmedMean: the coordinate-wise mean without the largest and smallest values."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from femfed import UserError
from femfed.strategies.base import Strategy, Update, Weights

_PART = 2**18  # values handled at a time


@dataclass(frozen=True)
class FedTrimmedMean(Strategy):
    """Every coordinate moves by the mean of what the clients sent without the extremes.

    ```
    server:  k = floor(trim_fraction * n)                n = clients of the round
             delta[j] = mean of delta_i[j] without the k smallest and the k largest
    ```

    All clients count alike, as in the paper. Up to k clients may send anything at all: every
    coordinate stays between values of honest ones. `trim_fraction=0` is FedAvg with equal weights;
    towards 0.5 it becomes the median.

    Where trim_fraction * n is whole in decimal, so many are cut; floating point would lose one of
    0.29 * 100, as SciPy's and Flower's trimmed means do.

    Source: D. Yin, Y. Chen, K. Ramchandran, P. Bartlett, "Byzantine-Robust Distributed Learning:
    Towards Optimal Statistical Rates", ICML 2018, https://arxiv.org/abs/1803.01498

    Attributes:
        trim_fraction: of the clients, cut from each side, in [0, 0.5); at least the fraction of
            clients that may lie.
    """

    trim_fraction: float

    def __post_init__(self) -> None:
        if not 0 <= self.trim_fraction < 0.5:
            raise UserError(
                f"strategy.trim_fraction={self.trim_fraction}; expected at least 0 and below 0.5"
            )

    def aggregate(self, updates: Sequence[Update]) -> Weights:
        """Return the coordinate-wise trimmed mean."""
        delta = [np.empty(layer.shape, np.float32) for layer in updates[0].delta]
        n = len(updates)
        cut = min(int(self.trim_fraction * n + 1e-9), (n - 1) // 2)
        for layer, part, values in _columns(updates):
            values.sort(axis=1)
            delta[layer].reshape(-1)[part] = values[:, cut : n - cut].mean(axis=1, dtype=np.float64)
        return delta


def _columns(
    updates: Sequence[Update],
) -> Iterator[tuple[int, slice, NDArray[np.float32]]]:
    """Yield a layer's number, a part of it, and that part of the updates, [coordinates, clients].

    Values of one coordinate lie together, in a copy that is small enough for the processor's
    cache: memory grows neither with the model nor with the clients.
    """
    step = max(1, _PART // len(updates))
    for layer, arrays in enumerate(zip(*(update.delta for update in updates), strict=True)):
        rows = [array.reshape(-1) for array in arrays]
        for start in range(0, rows[0].size, step):
            part = slice(start, start + step)
            yield layer, part, np.stack([row[part] for row in rows], axis=1)

"""FedMedian: the coordinate-wise median of the updates."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from femfed.strategies.base import Strategy, Update, Weights

_PART = 2**18  # values handled at a time


@dataclass(frozen=True)
class FedMedian(Strategy):
    """Every coordinate moves by the median of what the clients sent.

    ```
    server:  delta[j] = median_i(delta_i[j])             even counts: mean of the middle two
    ```

    All clients count alike, as in the paper. Of n clients, fewer than n / 2 may send anything at
    all: every coordinate stays between values of honest ones. With one or two clients it is
    FedAvg with equal weights.

    Source: D. Yin, Y. Chen, K. Ramchandran, P. Bartlett, "Byzantine-Robust Distributed Learning:
    Towards Optimal Statistical Rates", ICML 2018, https://arxiv.org/abs/1803.01498
    """

    def aggregate(self, updates: Sequence[Update]) -> Weights:
        """Return the coordinate-wise median."""
        delta = [np.empty(layer.shape, np.float32) for layer in updates[0].delta]
        low, high = (len(updates) - 1) // 2, len(updates) // 2
        for layer, part, values in _columns(updates):
            values.sort(axis=1)
            delta[layer].reshape(-1)[part] = values[:, [low, high]].mean(axis=1, dtype=np.float64)
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

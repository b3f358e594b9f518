"""FedMedian: the coordinate-wise median of the updates."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from femfed.strategies.base import Strategy, Update, Weights
from femfed.strategies.columns import by_rank


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
        low, high = (len(updates) - 1) // 2, len(updates) // 2

        def median(values: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
            middle: NDArray[np.float64] = np.add(values[low], values[high], dtype=np.float64) / 2
            return middle

        return by_rank(updates, [low, high], median)

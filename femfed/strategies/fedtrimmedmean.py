"""FedTrimmedMean: the coordinate-wise mean without the largest and smallest values."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from femfed import UserError
from femfed.strategies.base import Strategy, Update, Weights
from femfed.strategies.columns import by_rank


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
        n = len(updates)
        cut = min(int(self.trim_fraction * n + 1e-9), (n - 1) // 2)
        kept = range(cut, n - cut)

        def trimmed_mean(values: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
            total = values[cut].astype(np.float64)
            for rank in kept[1:]:
                total += values[rank]
            return total / len(kept)

        return by_rank(updates, kept, trimmed_mean)

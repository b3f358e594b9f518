"""Bulyan: updates selected by Krum, then a trimmed mean around their median."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from femfed import UserError
from femfed.strategies.base import Strategy, Update, Weights
from femfed.strategies.columns import (
    by_coordinate,
    check_byzantine,
    krum_scores,
    squared_distances,
    withstood,
)


@dataclass(frozen=True)
class Bulyan(Strategy):
    """The mean of the values closest to the median, among updates selected by Krum.

    ```
    server:  theta = n - 2 * byzantine                   n = clients of the round
             beta = theta - 2 * byzantine
             theta times: move Krum's choice among the remaining updates to the selected
             delta[j] = mean of the beta values selected_i[j] closest to their median
    ```

    Krum takes the update of the smallest sum of squared distances to its m - byzantine - 2 nearest
    others, of m remaining, at least to 1: with `byzantine=1` the last choice would compare
    nothing. Among equal scores the lowest client number wins, of two values equally far from the
    median the smaller. `byzantine=0` is FedAvg with equal weights.

    Flower selects the theta best of Krum's first ranking, which `rescored=false` offers. The
    authors' later code selects two fewer, each a mean of several updates; that is another rule.

    Source: E. M. El Mhamdi, R. Guerraoui, S. Rouault, "The Hidden Vulnerability of Distributed
    Learning in Byzantium", ICML 2018, https://arxiv.org/abs/1802.07927

    Attributes:
        byzantine: how many clients of a round may lie, at least 0; fewer than 4 * byzantine + 3
            updates are an error. None: as many as the round's n updates withstand, (n - 3) / 4
            rounded down.
        rescored: whether scores are computed anew after every choice.
    """

    byzantine: int | None
    rescored: bool

    def __post_init__(self) -> None:
        check_byzantine(self.byzantine)
        if type(self.rescored) is not bool:
            raise UserError(f"strategy.rescored={self.rescored}; expected true or false")

    def aggregate(self, updates: Sequence[Update]) -> Weights:
        """Return the mean of the middle values of the selected updates."""
        byzantine = withstood(self.byzantine, len(updates), each=4)
        updates = sorted(updates, key=lambda update: update.client)
        squared = squared_distances(updates)
        chosen = self._chosen(squared, byzantine, len(updates) - 2 * byzantine)

        def mean_around_median(values: NDArray[np.float32]) -> NDArray[np.float64]:
            values.sort(axis=1)
            return _mean_around_median(values, 2 * byzantine)

        return by_coordinate([updates[i] for i in chosen], mean_around_median)

    def _chosen(self, squared: NDArray[np.float64], byzantine: int, theta: int) -> list[int]:
        if not self.rescored:
            return [
                int(i) for i in np.argsort(krum_scores(squared, byzantine), kind="stable")[:theta]
            ]
        left, chosen = list(range(len(squared))), list[int]()
        while len(chosen) < theta:
            scores = krum_scores(squared[np.ix_(left, left)], byzantine)
            chosen.append(left.pop(int(np.argmin(scores))))
        return chosen


def _mean_around_median(values: NDArray[np.float32], far: int) -> NDArray[np.float64]:
    """Return each row's mean without the `far` values farthest from its median.

    In a sorted row the closest values are neighbours. Of the k-th smallest and the (k + closest)-th
    one is among them; it is the upper one for every k below their first.

    Args:
        values: [coordinates, clients], rows in ascending order.
        far: how many to leave out.
    """
    n = values.shape[1]
    closest = n - far
    median = values[:, [(n - 1) // 2, n // 2]].mean(axis=1, keepdims=True, dtype=np.float64)
    upper = median - values[:, :far] > values[:, closest:] - median
    kept = upper.sum(axis=1, keepdims=True) + np.arange(closest)
    mean: NDArray[np.float64] = np.take_along_axis(values, kept, 1).mean(axis=1, dtype=np.float64)
    return mean

"""Bulyan: updates selected by Krum, then a trimmed mean around their median."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from femfed import UserError
from femfed.strategies.base import Strategy, Update, Weights
from femfed.strategies.columns import (
    by_rank,
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

        return by_rank(
            [updates[i] for i in chosen],
            range(len(chosen)),
            lambda values: _mean_around_median(values, 2 * byzantine),
        )

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


def _mean_around_median(values: Sequence[NDArray[np.float32]], far: int) -> NDArray[np.float64]:
    """Return each coordinate's mean without the `far` values farthest from its median.

    Of sorted values the closest ones are neighbours. Of the k-th smallest and the (k + closest)-th
    one is among them; it is the upper one for every k below their first.

    Args:
        values: in ascending order, n of `[coordinates]`.
        far: how many to leave out.
    """
    n, size = len(values), values[0].size
    closest = n - far
    median = np.add(values[(n - 1) // 2], values[n // 2], dtype=np.float64) / 2
    first = np.zeros(size, np.intp)
    for k in range(far):
        first += median - values[k] > values[k + closest] - median
    places, table = first * size + np.arange(size), np.concatenate(values)
    total = np.zeros(size)
    for _ in range(closest):
        total += table[places]
        places += size
    return total / closest

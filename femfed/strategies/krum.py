"""Krum: the one update that lies closest to its neighbours."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from femfed import UserError
from femfed.strategies.base import Strategy, Update, Weights

_PART = 2**18  # values handled at a time


@dataclass(frozen=True)
class Krum(Strategy):
    """The update of the client whose nearest neighbours are nearest.

    ```
    server:  score_i = sum of ||delta_i - delta_j||^2 over the n - byzantine - 2 nearest j != i
             delta = delta_i of the smallest score       n = clients of the round
    ```

    Among equal scores the lowest client number wins. One or two updates leave nothing to compare:
    the first is taken. Squared distances are summed in float64 from the middle of the updates;
    Flower's come from float32 inner products of whole weights and lose the difference of two
    clients to rounding.

    Source: P. Blanchard, E. M. El Mhamdi, R. Guerraoui, J. Stainer, "Machine Learning with
    Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017,
    https://arxiv.org/abs/1703.02757

    Attributes:
        byzantine: how many clients of a round may lie, at least 0; fewer than 2 * byzantine + 3
            updates are an error. None: as many as the round's n updates withstand, (n - 3) / 2
            rounded down.
    """

    byzantine: int | None

    def __post_init__(self) -> None:
        if self.byzantine is not None and (type(self.byzantine) is not int or self.byzantine < 0):
            raise UserError(
                f"strategy.byzantine={self.byzantine}; expected a whole number of at least 0, "
                "or null for as many as the rule withstands"
            )

    def aggregate(self, updates: Sequence[Update]) -> Weights:
        """Return a copy of the chosen update."""
        byzantine = self._withstood(len(updates))
        updates = sorted(updates, key=lambda update: update.client)
        best = int(np.argmin(_scores(_squared_distances(updates), byzantine)))
        return [np.array(layer, np.float32) for layer in updates[best].delta]

    def _withstood(self, n: int) -> int:
        """Return how many of n clients may be byzantine."""
        if self.byzantine is None:
            return max(0, (n - 3) // 2)
        least = 2 * self.byzantine + 3 if self.byzantine else 1
        if n < least:
            raise UserError(
                f"strategy.byzantine={self.byzantine} with {n} updates in a round; expected at "
                f"least {least}: raise clients_per_round (clients may fail) or lower byzantine"
            )
        return self.byzantine


def _scores(squared: NDArray[np.float64], byzantine: int) -> NDArray[np.float64]:
    """Return each update's sum of squared distances to its `n - byzantine - 2` nearest others."""
    n = len(squared)
    nearest = min(max(1, n - byzantine - 2), n - 1)
    scores: NDArray[np.float64] = np.sort(squared, axis=1)[:, :nearest].sum(axis=1)
    return scores


def _squared_distances(updates: Sequence[Update]) -> NDArray[np.float64]:
    """Return the updates' squared distances from each other, infinite from themselves.

    ```
    ||x - y||^2 = (x - c).(x - c) + (y - c).(y - c) - 2 (x - c).(y - c)
    ```

    c is a value from the middle of every coordinate, not the mean, which a single far client would
    carry off: honest updates stay near it, and nothing of their distances cancels in float64.
    """
    gram = np.zeros((len(updates), len(updates)))
    for _, _, values in _columns(updates):
        middle = np.sort(values, axis=1)[:, len(updates) // 2, None]
        centred = values - middle.astype(np.float64)
        gram += centred.T @ centred
    squared_norms = np.diag(gram)
    squared = np.maximum(squared_norms[:, None] + squared_norms - 2 * gram, 0.0)
    np.fill_diagonal(squared, np.inf)
    return squared


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

"""Krum: the one update that lies closest to its neighbours."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from femfed.strategies.base import Strategy, Update, Weights
from femfed.strategies.columns import check_byzantine, krum_scores, squared_distances, withstood


@dataclass(frozen=True)
class Krum(Strategy):
    """The update of the client whose nearest neighbours are nearest.

    ```
    server:  score_i = sum of ||delta_i - delta_j||^2 over the n - byzantine - 2 nearest j != i
             delta = delta_i of the smallest score       n = clients of the round
    ```

    Among equal scores the lowest client number wins. One or two updates leave nothing to compare:
    the first is taken. Squared distances are summed in float64 from an origin near the updates;
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
        check_byzantine(self.byzantine)

    def aggregate(self, updates: Sequence[Update]) -> Weights:
        """Return a copy of the chosen update."""
        byzantine = withstood(self.byzantine, len(updates), each=2)
        updates = sorted(updates, key=lambda update: update.client)
        best = int(np.argmin(krum_scores(squared_distances(updates), byzantine)))
        return [np.array(layer, np.float32) for layer in updates[best].delta]

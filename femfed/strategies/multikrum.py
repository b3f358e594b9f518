"""Multi-Krum: the mean of the updates that lie closest to their neighbours."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from femfed import UserError
from femfed.strategies.base import Strategy, Update, Weights
from femfed.strategies.columns import (
    check_byzantine,
    krum_scores,
    squared_distances,
    weighted_mean,
    withstood,
)


@dataclass(frozen=True)
class MultiKrum(Strategy):
    """The mean of the updates whose nearest neighbours are nearest.

    ```
    server:  score_i = sum of ||delta_i - delta_j||^2 over the n - byzantine - 2 nearest j != i
             delta = mean of the `selected` delta_i of the smallest scores
    ```

    Among equal scores lower client numbers win. `selected=1` is Krum; `selected` of all clients is
    FedAvg, with `by_examples`, and with equal weights otherwise.

    The paper averages without weights, and so do we; Flower weighs the selected by their examples,
    which `by_examples` offers: then a client that lies about its examples counts more. Codes differ
    in how many they select: the paper's experiments and ByzFL n - byzantine, AggregaThor
    n - byzantine - 2, Flower one.

    Source: P. Blanchard, E. M. El Mhamdi, R. Guerraoui, J. Stainer, "Machine Learning with
    Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017,
    https://arxiv.org/abs/1703.02757

    Attributes:
        byzantine: how many clients of a round may lie, at least 0; fewer than 2 * byzantine + 3
            updates are an error. None: as many as the round's n updates withstand, (n - 3) / 2
            rounded down.
        selected: how many updates are averaged, at least 1 and at most the round's n. None:
            n - byzantine.
        by_examples: whether the selected count by their examples; otherwise all alike.
    """

    byzantine: int | None
    selected: int | None
    by_examples: bool

    def __post_init__(self) -> None:
        check_byzantine(self.byzantine)
        if self.selected is not None and (type(self.selected) is not int or self.selected < 1):
            raise UserError(
                f"strategy.selected={self.selected}; expected a whole number of at least 1, "
                "or null for all but the byzantine ones"
            )
        if type(self.by_examples) is not bool:
            raise UserError(f"strategy.by_examples={self.by_examples}; expected true or false")

    def aggregate(self, updates: Sequence[Update]) -> Weights:
        """Return the mean of the selected updates."""
        byzantine = withstood(self.byzantine, len(updates), each=2)
        selected = self.selected or len(updates) - byzantine
        if selected > len(updates):
            raise UserError(
                f"strategy.selected={selected} with {len(updates)} updates in a round; expected at "
                f"least {selected}: raise clients_per_round (clients may fail) or lower selected"
            )
        updates = sorted(updates, key=lambda update: update.client)
        scores = krum_scores(squared_distances(updates), byzantine)
        best = [updates[i] for i in np.sort(np.argsort(scores, kind="stable")[:selected])]
        weights = np.array([u.examples if self.by_examples else 1 for u in best], np.float64)
        return weighted_mean(best, weights / weights.sum())

"""RFA: the geometric median of the updates, by Weiszfeld's algorithm."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from femfed import UserError
from femfed.strategies.base import Strategy, Update, Weights
from femfed.strategies.columns import gram_matrix, weighted_mean


@dataclass(frozen=True)
class GeometricMedian(Strategy):
    """The point whose distances to the clients' updates have the smallest weighted mean.

    ```
    server:  a_i = n_i / sum_k n_k                       n_i = examples of client i
             delta = sum_i a_i delta_i
             `iterations` times:
                 b_i = a_i / max(smoothing, ||delta - delta_i||)
                 delta = sum_i b_i delta_i / sum_i b_i
    ```

    The algorithm is known as RFA, robust federated aggregation. Clients of less than half the
    weight may send anything at all. `iterations=0` is FedAvg, and so is a `smoothing` beyond all
    distances.

    The authors' codes run 4 iterations, each of which is a round of communication to them (the one
    for FEMNIST fewer once the objective falls by less than a millionth). That leaves far clients
    much of their pull: of weight a in all, they carry delta off less by a factor of only
    a / (1 - a) at a time. Here an iteration costs next to nothing at any size of the model, since
    delta is always a mean of the updates and inner products of these are all it takes. We run
    many, and a fixed number of them; `iterations=4` is the codes'.

    Source: K. Pillutla, S. M. Kakade, Z. Harchaoui, "Robust Aggregation for Federated Learning",
    IEEE Transactions on Signal Processing 2022, https://arxiv.org/abs/1912.13445

    Attributes:
        iterations: of Weiszfeld's algorithm, at least 0.
        smoothing: smaller distances count as this one, greater than 0; the paper's nu, 1e-6 in the
            authors' code for TensorFlow Federated and 1e-5 in the one for FEMNIST.
        by_examples: whether clients count by their examples, as in the paper; otherwise all alike,
            so that none can claim to count more.
    """

    iterations: int
    smoothing: float
    by_examples: bool

    def __post_init__(self) -> None:
        if type(self.iterations) is not int or self.iterations < 0:
            raise UserError(
                f"strategy.iterations={self.iterations}; expected a whole number of at least 0"
            )
        if not 0 < self.smoothing < float("inf"):
            raise UserError(f"strategy.smoothing={self.smoothing}; expected more than 0")
        if type(self.by_examples) is not bool:
            raise UserError(f"strategy.by_examples={self.by_examples}; expected true or false")

    def aggregate(self, updates: Sequence[Update]) -> Weights:
        """Return the smoothed geometric median."""
        updates = sorted(updates, key=lambda update: update.client)
        share = np.array([u.examples if self.by_examples else 1 for u in updates], np.float64)
        share /= share.sum()
        weights = share
        gram = gram_matrix(updates) if self.iterations else np.zeros(0)
        for _ in range(self.iterations):
            # ||sum_k w_k x_k - x_i||^2, with sum_k w_k = 1
            inner = gram @ weights
            squared = weights @ inner - 2 * inner + np.diag(gram)
            weights = share / np.maximum(np.sqrt(np.maximum(squared, 0.0)), self.smoothing)
            weights /= weights.sum()
        return weighted_mean(updates, weights)

"""FedDyn: clients' losses are bent so that their minima agree with the minimum of all."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from femfed import UserError
from femfed.strategies.base import (
    ALIKE,
    Array,
    Cohort,
    Memory,
    Outcome,
    State,
    Strategy,
    Weights,
    elementwise,
)


@dataclass(frozen=True)
class FedDyn(Strategy):
    """Federated averaging whose clients minimise `loss - <h_i, w> + a / 2 * ||w - w_global||^2`.

    ```
    client:  g <- g - h_i + a * (w - w_global)            every local step; a = regularization
             h_i <- h_i - a * (w - w_global)              after the last
    server:  h <- h - a * clients of the round / clients * mean_i(w_i - w)
             w <- w + mean_i(w_i - w) - h / a
    ```

    `regularization` is `alpha` in the paper. `h_i` is the client's gradient at the weights where
    its local steps ended, as far as they reached a minimum; `h` is the mean of the `h_i` of all
    clients at all times (with `weighting=uniform`, which is the paper's). Where the run comes to
    rest, `h` is zero and every client's gradient is its `h_i`: a minimum of the mean loss, however
    many local steps are taken.

    The authors' code is the same with `-h / a` in place of `h`, the mean of what the clients keep.
    For clients of different size it divides `regularization` by each client's share of the
    images, which a client here cannot know: `weighting=examples` weighs the two means instead, and
    `h` is then the weighted mean only as far as every round's clients hold their share of all
    images. No setting is FedAvg, as `h / a` has no limit at 0.

    Source: D. A. E. Acar, Y. Zhao, R. M. Navarro, M. Mattina, P. N. Whatmough, V. Saligrama,
    "Federated Learning Based on Dynamic Regularization", ICLR 2021,
    https://arxiv.org/abs/2111.04263

    Attributes:
        regularization: strength of the pull, above 0; 0.01 in the authors' examples.
        weighting: of clients in the mean: `uniform` or `examples`.
    """

    regularization: float
    weighting: str

    def __post_init__(self) -> None:
        if not 0 < self.regularization < float("inf"):
            raise UserError(f"strategy.regularization={self.regularization}; expected above 0")
        if self.weighting not in ("uniform", "examples"):
            raise UserError(f"strategy.weighting={self.weighting}; expected uniform or examples")

    def new_memory(self, weights: Weights) -> Memory:
        """Return `h_i` of zero."""
        return {"gradient": [np.zeros_like(w) for w in weights]}

    def correct_gradients(
        self,
        gradients: Sequence[Any],
        weights: Sequence[Any],
        global_weights: Sequence[Any],
        memory: dict[str, Any],
        state: dict[str, Any],
    ) -> Sequence[Any]:
        """Return `g - h_i + regularization * (w - w_global)`."""
        return [
            g - h + self.regularization * (w - w_global)
            for g, h, w, w_global in zip(
                gradients, memory["gradient"], weights, global_weights, strict=True
            )
        ]

    def finish(
        self,
        weights: Sequence[Any],
        global_weights: Sequence[Any],
        memory: dict[str, Any],
        state: dict[str, Any],
        path: Any,
        gradient: Sequence[Any],
    ) -> tuple[dict[str, Any], Sequence[Any]]:
        """Return `h_i - regularization * (w - w_global)` to be remembered."""
        kept = [
            h - self.regularization * (w - w_global)
            for h, w, w_global in zip(memory["gradient"], weights, global_weights, strict=True)
        ]
        return {"gradient": kept}, ()

    def weight(self, outcome: Outcome, most_steps: float) -> float:
        """Return how much a client counts: all alike, or by its examples."""
        return ALIKE if self.weighting == "uniform" else float(outcome.examples)

    def init(self, weights: Weights) -> State:
        """Return `h` of zero."""
        return {"gradient": [np.zeros_like(w) for w in weights]}

    def apply(
        self, weights: Weights, delta: Weights, state: State, cohort: Cohort
    ) -> tuple[Weights, State]:
        """Update `h`, then step by the mean update less `h / regularization`."""
        share = len(cohort.outcomes) / cohort.clients

        def step(w: Array, d: Array, h: Array) -> tuple[Array, Array]:
            mean: Array = h - self.regularization * share * d
            stepped: Array = w + d - (1 / self.regularization) * mean
            return stepped, mean

        stepped, mean = elementwise(step, weights, delta, state["gradient"])
        return stepped, {"gradient": mean}

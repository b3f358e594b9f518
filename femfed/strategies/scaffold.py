"""SCAFFOLD: control variates cancel what is peculiar to a client in every local step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from femfed import UserError
from femfed.strategies.base import ALIKE, Cohort, Memory, Outcome, State, Strategy, Weights, moved

# Squares of `path` are far above it; where no step was taken it alone is left in a denominator.
_TINY = 1e-30


@dataclass(frozen=True)
class Scaffold(Strategy):
    """Federated averaging whose clients exchange their own mean gradient for everybody's.

    ```
    client:  g <- g - c_i + c                             every local step
             c_i' = c_i - c + (w_global - w) / path       path = local steps * learning rate
             sends w - w_global and c_i' - c_i
    server:  w <- w + server_learning_rate * mean_i(w_i - w)
             c <- c + clients of the round / clients * mean_i(c_i' - c_i)
    ```

    This is option II of the paper: `c_i'` is the mean of the gradients of the client's local
    steps, which costs no further pass over its images. With client momentum, `path` counts how
    often gradients entered the update, and `c_i'` is their mean so weighted. A client without a
    step keeps its `c_i`.

    All control variates start at zero: with `weighting=examples` and `server_learning_rate=1` the
    first round is FedAvg to rounding (bit for bit where no dense kernel has more than a million
    weights). With `weighting=uniform`, which is the paper's, `c` is the
    mean of the `c_i` of all clients at all times, and the run goes to the minimum of the clients'
    mean loss. With `weighting=examples` images count alike instead of clients; `c` is then the
    weighted mean only as far as every round's clients hold their share of all images. (The code
    published with FedDyn corrects this by each client's share, which a client here cannot know.)

    Source: S. P. Karimireddy, S. Kale, M. Mohri, S. J. Reddi, S. U. Stich, A. T. Suresh,
    "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020,
    https://arxiv.org/abs/1910.06378

    Attributes:
        server_learning_rate: what the mean update is multiplied by, above 0; 1 in the paper's
            experiments.
        weighting: of clients in both means: `uniform` or `examples`.
    """

    server_learning_rate: float
    weighting: str

    broadcasts: ClassVar[tuple[str, ...]] = ("control",)
    sends_extra: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.server_learning_rate < float("inf"):
            raise UserError(
                f"strategy.server_learning_rate={self.server_learning_rate}; expected above 0"
            )
        if self.weighting not in ("uniform", "examples"):
            raise UserError(f"strategy.weighting={self.weighting}; expected uniform or examples")

    def new_memory(self, weights: Weights) -> Memory:
        """Return a control variate of zero."""
        return {"control": [np.zeros_like(w) for w in weights]}

    def correct_gradients(
        self,
        gradients: Sequence[Any],
        weights: Sequence[Any],
        global_weights: Sequence[Any],
        memory: dict[str, Any],
        state: dict[str, Any],
    ) -> Sequence[Any]:
        """Return `g - c_i + c`."""
        return [
            g - own + c
            for g, own, c in zip(gradients, memory["control"], state["control"], strict=True)
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
        """Return the client's next control variate, and its change to be sent."""
        # 1 / path, but 0 without a step: a writer may have no image to train on, and one NaN
        # would spoil everybody's control variate.
        per_path = path / (path * path + _TINY)
        moved = path * per_path
        change = [
            per_path * (w_global - w) - moved * c
            for w, w_global, c in zip(weights, global_weights, state["control"], strict=True)
        ]
        control = [own + d for own, d in zip(memory["control"], change, strict=True)]
        return {"control": control}, change

    def weight(self, outcome: Outcome, most_steps: float) -> float:
        """Return how much a client counts: all alike, or by its examples."""
        return ALIKE if self.weighting == "uniform" else float(outcome.examples)

    def init(self, weights: Weights) -> State:
        """Return a server control variate of zero."""
        return {"control": [np.zeros_like(w) for w in weights]}

    def apply(
        self, weights: Weights, delta: Weights, state: State, cohort: Cohort
    ) -> tuple[Weights, State]:
        """Step along the mean update, and let the control variate follow the clients'."""
        share = len(cohort.outcomes) / cohort.clients
        control = moved(state["control"], cohort.extra, share)
        return moved(weights, delta, self.server_learning_rate), {"control": control}

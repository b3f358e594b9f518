"""MimeLite: clients step with the server's momentum, which keeps still while they do."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from femfed import UserError
from femfed.strategies.base import ALIKE, Cohort, Outcome, State, Strategy, Weights, elementwise


@dataclass(frozen=True)
class MimeLite(Strategy):
    """Federated averaging whose clients mimic SGD with momentum on everybody's images.

    ```
    client:  g <- (1 - beta) * g + beta * m               every local step, m as broadcast
             sends w - w_global and the gradient of its loss over all its images at w_global
    server:  w <- w + server_learning_rate * mean_i(w_i - w)
             m <- beta * m + (1 - beta) * mean_i(gradient_i)
    ```

    It is the paper's Mime without the control variate, with momentum as the optimizer to mimic.
    `m` starts at zero, so that the first steps are short by `1 - beta`. `beta=0` is FedAvg with
    the same `weighting` if `server_learning_rate=1`, to rounding (bit for bit where no dense
    kernel has more than a million weights). Client momentum
    (`local.momentum`) would come on top and is none of this.

    The paper writes plain means over clients; FedJAX and TensorFlow Federated weigh by examples,
    and their SGD adds up `m <- beta * m + gradient` without the factor `1 - beta`: the same as
    this one with a client learning rate larger by `1 / (1 - beta)`.

    Source: S. P. Karimireddy, M. Jaggi, S. Kale, M. Mohri, S. J. Reddi, S. U. Stich, A. T. Suresh,
    "Breaking the Centralized Barrier for Cross-Device Federated Learning", NeurIPS 2021; first as
    "Mime: Mimicking Centralized Stochastic Algorithms in Federated Learning",
    https://arxiv.org/abs/2008.03606

    Attributes:
        server_learning_rate: what the mean update is multiplied by, above 0; 1 in the paper.
        beta: share of the momentum in a step, in [0, 1).
        weighting: of clients in both means: `uniform` or `examples`.
    """

    server_learning_rate: float
    beta: float
    weighting: str

    broadcasts: ClassVar[tuple[str, ...]] = ("momentum",)
    sends_extra: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})

    def __post_init__(self) -> None:
        if not 0 < self.server_learning_rate < float("inf"):
            raise UserError(
                f"strategy.server_learning_rate={self.server_learning_rate}; expected above 0"
            )
        if not 0 <= self.beta < 1:
            raise UserError(f"strategy.beta={self.beta}; expected at least 0, below 1")
        if self.weighting not in ("uniform", "examples"):
            raise UserError(f"strategy.weighting={self.weighting}; expected uniform or examples")

    def correct_gradients(
        self,
        gradients: Sequence[Any],
        weights: Sequence[Any],
        global_weights: Sequence[Any],
        memory: dict[str, Any],
        state: dict[str, Any],
    ) -> Sequence[Any]:
        """Return `(1 - beta) * g + beta * m`."""
        return [
            (1 - self.beta) * g + self.beta * m
            for g, m in zip(gradients, state["momentum"], strict=True)
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
        """Return nothing to remember, and the gradient at the global weights to be sent."""
        return memory, gradient

    def weight(self, outcome: Outcome, most_steps: float) -> float:
        """Return how much a client counts: all alike, or by its examples."""
        return ALIKE if self.weighting == "uniform" else float(outcome.examples)

    def init(self, weights: Weights) -> State:
        """Return a momentum of zero."""
        return {"momentum": [np.zeros_like(w) for w in weights]}

    def apply(
        self, weights: Weights, delta: Weights, state: State, cohort: Cohort
    ) -> tuple[Weights, State]:
        """Step along the mean update; the momentum takes in the mean gradient."""
        stepped, momentum = elementwise(
            lambda w, d, m, g: (
                w + self.server_learning_rate * d,
                self.beta * m + (1 - self.beta) * g,
            ),
            weights,
            delta,
            state["momentum"],
            cohort.extra,
        )
        return stepped, {"momentum": momentum}

"""FedAvgM: the server steps along a sum of past updates."""

from dataclasses import dataclass

import numpy as np

from femfed import UserError
from femfed.strategies.base import Array, Cohort, State, Strategy, Weights, elementwise


@dataclass(frozen=True)
class FedAvgM(Strategy):
    """Federated averaging with momentum on the server.

    ```
    server:  v <- server_momentum * v + delta            v = 0 before the first round
             w <- w + server_learning_rate * v
             w <- w + server_learning_rate * (server_momentum * v + delta)     with nesterov
    ```

    `server_momentum=0` with `server_learning_rate=1` is FedAvg bit for bit.

    Hsu et al. step with a rate of 1 and use Nesterov's form. Reddi et al. tune the rate, and theirs
    is the plain form; so is Flower's. The velocity is as heavy as `1 / (1 - server_momentum)`
    updates, so the rate goes down as the momentum goes up.

    Source: T.-M. H. Hsu, H. Qi, M. Brown, "Measuring the Effects of Non-Identical Data Distribution
    for Federated Visual Classification", 2019, https://arxiv.org/abs/1909.06335

    Attributes:
        server_learning_rate: above 0; 1 in the paper.
        server_momentum: share of the velocity that is kept, at least 0 and below 1; the paper
            tries 0.7, 0.9, 0.97, 0.99 and 0.997.
        nesterov: look one step ahead along the velocity.
    """

    server_learning_rate: float
    server_momentum: float
    nesterov: bool

    def __post_init__(self) -> None:
        rate, momentum = self.server_learning_rate, self.server_momentum
        if not 0 < rate < float("inf"):
            raise UserError(f"strategy.server_learning_rate={rate}; expected more than 0")
        if not 0 <= momentum < 1:
            raise UserError(f"strategy.server_momentum={momentum}; expected at least 0 and below 1")

    def init(self, weights: Weights) -> State:
        """Return a velocity of zero."""
        return {"velocity": [np.zeros_like(w) for w in weights]}

    def apply(
        self, weights: Weights, delta: Weights, state: State, cohort: Cohort
    ) -> tuple[Weights, State]:
        """Return the weights after a step along the new velocity, and that velocity."""

        def step(w: Array, d: Array, v: Array) -> tuple[Array, Array]:
            v = self.server_momentum * v + d
            ahead = self.server_momentum * v + d if self.nesterov else v
            return w + self.server_learning_rate * ahead, v

        stepped, velocity = elementwise(step, weights, delta, state["velocity"])
        return stepped, {"velocity": velocity}

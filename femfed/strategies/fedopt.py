"""FedOpt: the mean update is a gradient, and the server an optimizer: SGD with momentum."""

from dataclasses import dataclass

import numpy as np

from femfed import UserError
from femfed.strategies.base import Array, Cohort, State, Strategy, Weights, elementwise


@dataclass(frozen=True)
class FedOpt(Strategy):
    """Reddi et al.'s general form, `w <- SERVEROPT(w, -delta)`, with SGD as the server's optimizer.

    ```
    server:  v <- server_momentum * v + server_learning_rate * (1 - dampening) * delta
             w <- w + v
             w <- w + server_momentum * v
                    + server_learning_rate * (1 - dampening) * delta           with nesterov
    ```

    The velocity, 0 before the first round, is a step and holds the learning rate, as in Keras'
    SGD; FedAvgM's is a sum of updates, and its rate is applied outside. For a rate that stays the
    same both walk the same way. What FedOpt adds is `dampening`: with `dampening=server_momentum`
    the velocity is the moving average of updates that FedAdam, FedYogi and FedAdagrad divide by
    their second moments, so this is what they are without adaptivity. PyTorch's SGD dampens as well
    but takes the first update whole; here the average starts at zero as theirs does.

    `server_momentum=0` with `server_learning_rate=1` and `dampening=0` is FedAvg bit for bit.

    Source: S. J. Reddi, Z. Charles, M. Zaheer, Z. Garrett, K. Rush, J. Konecny, S. Kumar,
    H. B. McMahan, "Adaptive Federated Optimization", ICLR 2021, https://arxiv.org/abs/2003.00295

    Attributes:
        server_learning_rate: above 0.
        server_momentum: share of the velocity that is kept, at least 0 and below 1.
        dampening: share of the update that is left out, at least 0 and below 1.
        nesterov: look one step ahead along the velocity.
    """

    server_learning_rate: float
    server_momentum: float
    dampening: float
    nesterov: bool

    def __post_init__(self) -> None:
        rate = self.server_learning_rate
        if not 0 < rate < float("inf"):
            raise UserError(f"strategy.server_learning_rate={rate}; expected more than 0")
        for name in ("server_momentum", "dampening"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise UserError(f"strategy.{name}={value}; expected at least 0 and below 1")

    def init(self, weights: Weights) -> State:
        """Return a velocity of zero."""
        return {"velocity": [np.zeros_like(w) for w in weights]}

    def apply(
        self, weights: Weights, delta: Weights, state: State, cohort: Cohort
    ) -> tuple[Weights, State]:
        """Return the weights after a step of SGD, and the new velocity."""
        rate = self.server_learning_rate * (1 - self.dampening)

        def step(w: Array, d: Array, v: Array) -> tuple[Array, Array]:
            along = rate * d
            v = self.server_momentum * v + along
            return w + (self.server_momentum * v + along if self.nesterov else v), v

        stepped, velocity = elementwise(step, weights, delta, state["velocity"])
        return stepped, {"velocity": velocity}

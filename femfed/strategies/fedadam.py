"""FedAdam: the server steps along a moving average of updates, shorter where they are large."""

from dataclasses import dataclass

import numpy as np

from femfed import UserError
from femfed.strategies.base import Array, Cohort, State, Strategy, Weights, elementwise


@dataclass(frozen=True)
class FedAdam(Strategy):
    """Federated averaging with Adam on the server.

    ```
    server:  m <- beta_1 * m + (1 - beta_1) * delta      m = 0 before the first round
             v <- beta_2 * v + (1 - beta_2) * delta^2    v = initial_accumulator
             w <- w + rate * m / (sqrt(v) + tau)
             w <- w + rate * m / sqrt(v + tau)           with tau_inside_root
             rate = server_learning_rate
             rate = server_learning_rate * sqrt(1 - beta_2^t) / (1 - beta_1^t)
                                                         with bias_correction, t = 1 in round 1
    ```

    Powers and roots are taken element by element. The published accuracies come from the authors'
    code, which runs Keras' Adam: bias correction and `initial_accumulator=0`; we follow it. The
    algorithm in the paper has neither the correction nor the zero (it wants at least `tau^2`). A
    first version of the paper has the square of `m` in place of that of `delta`, which no code
    does. `beta_2` is 0.99 in the paper and in Flower, 0.999 in the authors' code. Flower's FedAdam
    corrects with `t = 2` in round 1.

    Source: S. J. Reddi, Z. Charles, M. Zaheer, Z. Garrett, K. Rush, J. Konecny, S. Kumar,
    H. B. McMahan, "Adaptive Federated Optimization", ICLR 2021, https://arxiv.org/abs/2003.00295

    Attributes:
        server_learning_rate: above 0.
        beta_1: share of the moving average of updates that is kept, at least 0 and below 1.
        beta_2: share of the moving average of squares that is kept, at least 0 and below 1.
        tau: above 0; the larger, the less adaptive.
        bias_correction: undo that both averages start too small.
        initial_accumulator: what the average of squares starts from, at least 0.
        tau_inside_root: whether `tau` is added before the root is taken.
    """

    server_learning_rate: float
    beta_1: float
    beta_2: float
    tau: float
    bias_correction: bool
    initial_accumulator: float
    tau_inside_root: bool

    def __post_init__(self) -> None:
        for name in ("server_learning_rate", "tau"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise UserError(f"strategy.{name}={value}; expected more than 0")
        for name in ("beta_1", "beta_2"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise UserError(f"strategy.{name}={value}; expected at least 0 and below 1")
        start = self.initial_accumulator
        if not 0 <= start < float("inf"):
            raise UserError(f"strategy.initial_accumulator={start}; expected at least 0")

    def init(self, weights: Weights) -> State:
        """Return the moments before the first round, and that no round is over."""
        return {
            "first_moment": [np.zeros_like(w) for w in weights],
            "accumulator": [np.full_like(w, self.initial_accumulator) for w in weights],
            "rounds": [np.zeros(1, np.float32)],
        }

    def apply(
        self, weights: Weights, delta: Weights, state: State, cohort: Cohort
    ) -> tuple[Weights, State]:
        """Return the weights after a step of Adam, and the new moments."""
        rounds = state["rounds"][0] + 1
        rate, t = self.server_learning_rate, float(rounds[0])
        if self.bias_correction:
            rate *= (1 - self.beta_2**t) ** 0.5 / (1 - self.beta_1**t)

        def step(w: Array, d: Array, m: Array, v: Array) -> tuple[Array, Array, Array]:
            m = self.beta_1 * m + (1 - self.beta_1) * d
            v = self.beta_2 * v + (1 - self.beta_2) * (d * d)
            scale = np.sqrt(v + self.tau) if self.tau_inside_root else np.sqrt(v) + self.tau
            return w + rate * m / scale, m, v

        moments = state["first_moment"], state["accumulator"]
        stepped, first, second = elementwise(step, weights, delta, *moments)
        return stepped, {"first_moment": first, "accumulator": second, "rounds": [rounds]}

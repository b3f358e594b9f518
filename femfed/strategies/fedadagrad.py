"""FedAdagrad: the server steps shorter where past updates were large."""

from dataclasses import dataclass

import numpy as np

from femfed import UserError
from femfed.strategies.base import Array, Cohort, State, Strategy, Weights, elementwise


@dataclass(frozen=True)
class FedAdagrad(Strategy):
    """Federated averaging with Adagrad on the server.

    ```
    server:  m <- beta_1 * m + (1 - beta_1) * delta      m = 0 before the first round
             v <- v + delta^2                            v = initial_accumulator
             w <- w + server_learning_rate * m / (sqrt(v) + tau)
             w <- w + server_learning_rate * m / sqrt(v + tau)     with tau_inside_root
    ```

    Powers and roots are taken element by element. The published accuracies were reached with
    `initial_accumulator=0`, says the authors' code, while the algorithm in the paper wants at least
    `tau^2`; we follow the code. The paper, Flower and TensorFlow's first Adagrad have `tau` outside
    the root, today's Keras has it inside. No published form corrects the bias of `m`, and this does
    not either; with `beta_1=0`, the paper's and the default, there is none.

    Source: S. J. Reddi, Z. Charles, M. Zaheer, Z. Garrett, K. Rush, J. Konecny, S. Kumar,
    H. B. McMahan, "Adaptive Federated Optimization", ICLR 2021, https://arxiv.org/abs/2003.00295

    Attributes:
        server_learning_rate: above 0.
        beta_1: share of the moving average of updates that is kept, at least 0 and below 1.
        tau: above 0; the larger, the less adaptive.
        initial_accumulator: what the sum of squares starts from, at least 0.
        tau_inside_root: whether `tau` is added before the root is taken.
    """

    server_learning_rate: float
    beta_1: float
    tau: float
    initial_accumulator: float
    tau_inside_root: bool

    def __post_init__(self) -> None:
        for name in ("server_learning_rate", "tau"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise UserError(f"strategy.{name}={value}; expected more than 0")
        if not 0 <= self.beta_1 < 1:
            raise UserError(f"strategy.beta_1={self.beta_1}; expected at least 0 and below 1")
        start = self.initial_accumulator
        if not 0 <= start < float("inf"):
            raise UserError(f"strategy.initial_accumulator={start}; expected at least 0")

    def init(self, weights: Weights) -> State:
        """Return the moments before the first round."""
        return {
            "first_moment": [np.zeros_like(w) for w in weights],
            "accumulator": [np.full_like(w, self.initial_accumulator) for w in weights],
        }

    def apply(
        self, weights: Weights, delta: Weights, state: State, cohort: Cohort
    ) -> tuple[Weights, State]:
        """Return the weights after a step of Adagrad, and the new moments."""

        def step(w: Array, d: Array, m: Array, v: Array) -> tuple[Array, Array, Array]:
            m = self.beta_1 * m + (1 - self.beta_1) * d
            v = v + d * d
            scale = np.sqrt(v + self.tau) if self.tau_inside_root else np.sqrt(v) + self.tau
            return w + self.server_learning_rate * m / scale, m, v

        moments = state["first_moment"], state["accumulator"]
        stepped, first, second = elementwise(step, weights, delta, *moments)
        return stepped, {"first_moment": first, "accumulator": second}

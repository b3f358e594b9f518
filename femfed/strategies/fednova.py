"""FedNova: updates are divided by their local steps before they are averaged."""

from dataclasses import dataclass

import numpy as np

from femfed import UserError
from femfed.strategies.base import (
    Array,
    Cohort,
    Outcome,
    State,
    Strategy,
    Weights,
    elementwise,
    moved,
)


@dataclass(frozen=True)
class FedNova(Strategy):
    """Federated averaging of updates per local step, so that the busy do not pull harder.

    ```
    server:  p_i = n_i / sum_j n_j                        n_i = examples of client i
             d = sum_i p_i tau_i * sum_i p_i (w_i - w) / tau_i     tau_i = local steps of client i
             v <- server_momentum * v + d
             w <- w + v
    ```

    FedAvg with different numbers of local steps goes to the minimum of another loss, in which
    client i counts `p_i tau_i`. Here it counts `p_i`, and the length of the step is kept
    (`sum_i p_i tau_i` is the paper's `tau_eff`). With as many steps at every client and
    `server_momentum=0` this is FedAvg bit for bit.

    `tau_i` is `Outcome.steps`: with client momentum the paper's `||a_i||_1`. The server momentum
    is that of the authors' code (a plain sum, nothing multiplied by `1 - server_momentum`); the
    paper calls it together with client momentum the hybrid scheme.

    Source: J. Wang, Q. Liu, H. Liang, G. Joshi, H. V. Poor, "Tackling the Objective Inconsistency
    Problem in Heterogeneous Federated Optimization", NeurIPS 2020,
    https://arxiv.org/abs/2007.07481

    Attributes:
        server_momentum: what is kept of the last round's step, in [0, 1).
    """

    server_momentum: float

    def __post_init__(self) -> None:
        if not 0 <= self.server_momentum < 1:
            raise UserError(
                f"strategy.server_momentum={self.server_momentum}; expected at least 0, below 1"
            )

    def weight(self, outcome: Outcome, most_steps: float) -> float:
        """Return `n_i / tau_i`, times the most steps of the round to stay as large as examples."""
        if not outcome.steps:  # a writer without an image to train on
            return 0.0
        # Divided first: where all took as many steps, the quotient is 1 and not about 1.
        return outcome.examples * (most_steps / outcome.steps)

    def init(self, weights: Weights) -> State:
        """Return a velocity of zero where there is momentum."""
        return {"velocity": [np.zeros_like(w) for w in weights]} if self.server_momentum else {}

    def apply(
        self, weights: Weights, delta: Weights, state: State, cohort: Cohort
    ) -> tuple[Weights, State]:
        """Step as far as the clients went on average, along the mean of their updates per step."""
        examples = sum(outcome.examples for outcome in cohort.outcomes)
        most_steps = cohort.most_steps
        # `delta` was divided by sum_i n_i most_steps / tau_i. Both factors are 1 for equal steps.
        mean_steps = sum(o.examples * (o.steps / most_steps) for o in cohort.outcomes) / examples
        scale = mean_steps * (cohort.weight_sum / examples)
        if not self.server_momentum:
            return moved(weights, delta, scale), state

        def step(w: Array, d: Array, v: Array) -> tuple[Array, Array]:
            velocity = self.server_momentum * v + scale * d
            return w + velocity, velocity

        stepped, velocity = elementwise(step, weights, delta, state["velocity"])
        return stepped, {"velocity": velocity}

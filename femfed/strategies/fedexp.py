"""FedExP: the server steps further the more the clients' updates disagree."""

from dataclasses import dataclass
from typing import ClassVar

from femfed import UserError
from femfed.strategies.base import (
    ALIKE,
    Cohort,
    Outcome,
    State,
    Strategy,
    Weights,
    moved,
    squared_norm,
)

WEIGHTINGS = ("uniform", "examples")


@dataclass(frozen=True)
class FedExP(Strategy):
    """Federated averaging with extrapolation: a server step found from the updates' norms.

    ```
    server:  delta = mean_i delta_i
             step = max(1, mean_i ||delta_i||^2 / (2 * (||delta||^2 + epsilon)))
             w <- w + step * delta
    ```

    Updates that are alike, or few, give a step of 1: FedAvg. The paper counts all clients alike;
    its authors' code weighs both means by the clients' examples, which is `weighting=examples`.
    That code also multiplies `epsilon` by the number of clients of the round, shrinks it with the
    square of the decaying client learning rate, and evaluates the mean of the last two global
    models; we follow the paper's rule and evaluate the last model.

    Source: D. Jhunjhunwala, S. Wang, G. Joshi, "FedExP: Speeding Up Federated Averaging via
    Extrapolation", ICLR 2023, https://arxiv.org/abs/2301.09604

    Attributes:
        epsilon: at least 0; keeps the step short where the mean update is small. The larger, the
            closer to FedAvg.
        weighting: of the clients in both means, `uniform` or `examples`.
    """

    epsilon: float
    weighting: str

    needs: ClassVar[frozenset[str]] = frozenset({"norm"})

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon < float("inf"):
            raise UserError(f"strategy.epsilon={self.epsilon}; expected at least 0")
        if self.weighting not in WEIGHTINGS:
            raise UserError(
                f"strategy.weighting={self.weighting}; expected {' or '.join(WEIGHTINGS)}"
            )

    def weight(self, outcome: Outcome, most_steps: float) -> float:
        """Return how much a client counts in both means."""
        return ALIKE if self.weighting == "uniform" else float(outcome.examples)

    def apply(
        self, weights: Weights, delta: Weights, state: State, cohort: Cohort
    ) -> tuple[Weights, State]:
        """Return `w + step * delta`."""
        most_steps = max(outcome.steps for outcome in cohort.outcomes)
        norms = sum(self.weight(o, most_steps) * o.squared_norm for o in cohort.outcomes)
        denominator = 2 * (squared_norm(delta) + self.epsilon)
        # Without epsilon the mean may be zero; then any step stays where it is.
        step = max(1.0, norms / cohort.weight_sum / denominator) if denominator else 1.0
        return moved(weights, delta, step), state

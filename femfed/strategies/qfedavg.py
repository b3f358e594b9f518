"""q-FedAvg: clients whose loss is high count for more."""

from dataclasses import dataclass
from typing import ClassVar

from femfed import UserError
from femfed.strategies.base import ALIKE, Cohort, Outcome, State, Strategy, Weights, moved

WEIGHTINGS = ("uniform", "examples")
TINY = 1e-10  # added to losses, so that a loss of zero has a power below zero
# Losses run from 4.1 (guessing) down to a few tenths. Halved, their powers up to the paper's q = 5
# neither add up to more than the engine can sum nor lose their digits to its rounding.
MIDDLE = 2.0


@dataclass(frozen=True)
class QFedAvg(Strategy):
    """Federated averaging for `sum_k F_k^(q + 1) / (q + 1)` instead of the sum of losses `F_k`.

    ```
    server:  L = 1 / client_learning_rate                an estimate of the loss' smoothness
             g_k = -L * delta_k                          of client k
             h_k = q * F_k^(q - 1) * ||g_k||^2 + L * F_k^q
             w <- w - sum_k F_k^q * g_k / sum_k h_k      q = fairness
    ```

    `F_k` is the loss of the global weights on the client's training images before it trains, as in
    the authors' code, which adds 1e-10 to it as we do. The weighted mean that the server is given
    is that of `F_k^q`, so the rule comes down to one scalar on it. `fairness=0` is FedAvg with
    clients that count alike; with `weighting=examples` it is FedAvg bit for bit.

    In the paper clients are drawn with probabilities proportional to their examples and then count
    alike, in Flower they are drawn uniformly and count alike: `weighting=uniform`. Clients here are
    drawn uniformly as well, so that `weighting=examples`, where both sums over clients are weighted
    by examples, has the paper's objective. Flower takes for `F_k` whatever training loss the client
    reports.

    Source: T. Li, M. Sanjabi, A. Beirami, V. Smith, "Fair Resource Allocation in Federated
    Learning", ICLR 2020, https://arxiv.org/abs/1905.10497

    Attributes:
        fairness: the `q` of the paper, at least 0; the larger, the more uniform the writers'
            losses are meant to be.
        client_learning_rate: above 0; with which the clients trained, by the paper's choice of `L`.
        weighting: of the clients besides their losses, `uniform` or `examples`.
    """

    fairness: float
    client_learning_rate: float
    weighting: str

    needs: ClassVar[frozenset[str]] = frozenset({"loss", "norm"})

    def __post_init__(self) -> None:
        if not 0 <= self.fairness < float("inf"):
            raise UserError(f"strategy.fairness={self.fairness}; expected at least 0")
        rate = self.client_learning_rate
        if not 0 < rate < float("inf"):
            raise UserError(f"strategy.client_learning_rate={rate}; expected more than 0")
        if self.weighting not in WEIGHTINGS:
            raise UserError(
                f"strategy.weighting={self.weighting}; expected {' or '.join(WEIGHTINGS)}"
            )

    def weight(self, outcome: Outcome, most_steps: float) -> float:
        """Return `F_k^q` up to a factor that all share, times the examples if these count."""
        share = ALIKE if self.weighting == "uniform" else float(outcome.examples)
        return float(share * ((outcome.loss_before + TINY) / MIDDLE) ** self.fairness)

    def apply(
        self, weights: Weights, delta: Weights, state: State, cohort: Cohort
    ) -> tuple[Weights, State]:
        """Return `w + step * delta` with the step that makes the mean of `F_k^q` the rule above."""
        most_steps = max(outcome.steps for outcome in cohort.outcomes)
        # h_k / L up to the factor that the weights have as well: the weight itself where q = 0.
        h = sum(
            self.weight(o, most_steps)
            * (
                1
                + self.fairness
                * o.squared_norm
                / (self.client_learning_rate * (o.loss_before + TINY))
            )
            for o in cohort.outcomes
        )
        step = cohort.weight_sum / h
        return moved(weights, delta, step), state

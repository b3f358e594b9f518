"""Fault-tolerant FedAvg: a round that too few clients completed does not count."""

from dataclasses import dataclass

from femfed import UserError
from femfed.strategies.base import Cohort, State, Strategy, Weights


@dataclass(frozen=True)
class FaultTolerantFedAvg(Strategy):
    """Federated averaging over rounds that enough of the drawn clients completed.

    ```
    server:  w <- w + delta                              completed / drawn >= min_completion_rate
             w <- w                                      otherwise
    ```

    What fails are the clients that `failure_rate` takes out of a round. A round at exactly the
    rate counts, as in Flower's legacy strategy of the same name, which this follows; a round that
    nobody completed never counts. `min_completion_rate=0` is FedAvg bit for bit.

    Source: The Flower Authors, `flwr.server.strategy.FaultTolerantFedAvg`,
    https://flower.ai/docs/framework/ref-api/flwr.server.strategy.FaultTolerantFedAvg.html

    Attributes:
        min_completion_rate: share of the drawn clients that have to complete a round, from 0 to 1.
    """

    min_completion_rate: float

    def __post_init__(self) -> None:
        rate = self.min_completion_rate
        if not 0 <= rate <= 1:
            raise UserError(f"strategy.min_completion_rate={rate}; expected 0 to 1")

    def apply(
        self, weights: Weights, delta: Weights, state: State, cohort: Cohort
    ) -> tuple[Weights, State]:
        """Return `w + delta`, or `w` where too few clients completed the round."""
        if len(cohort.outcomes) / cohort.drawn < self.min_completion_rate:
            return [w.copy() for w in weights], state
        return super().apply(weights, delta, state, cohort)

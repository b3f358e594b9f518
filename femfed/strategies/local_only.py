"""Local training without a federation: what a client comes to alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from femfed.strategies.base import Cohort, Memory, State, Strategy, Weights


@dataclass(frozen=True)
class LocalOnly(Strategy):
    """Every client trains a model of its own whenever it is drawn; nothing is exchanged.

    ```
    client:  v <- v - learning_rate * g(v)     every local step, kept
    server:  w <- w
    ```

    The baseline that federated learning has to beat for each client to be worth joining. A client
    is drawn as often as in any other strategy, so that all of them train for as long; those never
    drawn, and unseen writers, are tested with the initial weights. `clients_per_round=clients`
    trains everybody every round.

    Source: the local baseline of B. McMahan, E. Moore, D. Ramage, S. Hampson, B. Aguera y Arcas,
    "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
    https://arxiv.org/abs/1602.05629
    """

    exchanges = False

    def new_memory(self, weights: Weights) -> Memory:
        """Return the initial weights as the client's own."""
        return {"personal": [array.copy() for array in weights]}

    def begin(self, global_weights: Sequence[Any], memory: dict[str, Any]) -> Sequence[Any]:
        """Return the client's own weights."""
        own: Sequence[Any] = memory["personal"]
        return own

    def finish(
        self,
        weights: Sequence[Any],
        global_weights: Sequence[Any],
        memory: dict[str, Any],
        state: dict[str, Any],
        path: Any,
        gradient: Sequence[Any],
    ) -> tuple[dict[str, Any], Sequence[Any]]:
        """Keep the weights."""
        return {"personal": weights}, ()

    def personal_weights(self, global_weights: Sequence[Any], memory: Any) -> Sequence[Any]:
        """Return the client's own weights."""
        own: Sequence[Any] = memory["personal"]
        return own

    def apply(
        self, weights: Weights, delta: Weights, state: State, cohort: Cohort
    ) -> tuple[Weights, State]:
        """Return the weights as they are."""
        return weights, state

"""Ditto: a model of one's own beside the shared one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from femfed import UserError
from femfed.strategies.base import Memory, Strategy, Weights


@dataclass(frozen=True)
class Ditto(Strategy):
    """Federated averaging, and beside it every client's own model, pulled towards the shared one.

    ```
    client:  v <- v - learning_rate * (g(v) + pull * (v - w_global))     every local step, kept
             w <- w - learning_rate * g(w)                               as in FedAvg, sent
    ```

    Both take the same batches; the shared model is FedAvg's bit for bit. Clients are tested with
    their own model, which starts at the initial weights; a writer who never took part has none and
    is tested with the shared one. The second model doubles what a round costs.

    Source: T. Li, S. Hu, A. Beirami, V. Smith, "Ditto: Fair and Robust Federated Learning Through
    Personalization", ICML 2021, https://arxiv.org/abs/2012.04221

    Attributes:
        pull: lambda of the paper, at least 0: 0 is local training, a large one the shared model.
    """

    pull: float

    def __post_init__(self) -> None:
        if not 0 <= self.pull < float("inf"):
            raise UserError(f"strategy.pull={self.pull}; expected at least 0")

    def new_memory(self, weights: Weights) -> Memory:
        """Return the initial weights as the client's own."""
        return {"personal": [array.copy() for array in weights]}

    def correct_personal_gradients(
        self, gradients: Sequence[Any], weights: Sequence[Any], global_weights: Sequence[Any]
    ) -> Sequence[Any]:
        """Return `g + pull * (v - w_global)`."""
        return [
            g + self.pull * (v - w_global)
            for g, v, w_global in zip(gradients, weights, global_weights, strict=True)
        ]

    def personal_weights(self, global_weights: Sequence[Any], memory: Any) -> Sequence[Any]:
        """Return the client's own weights."""
        own: Sequence[Any] = memory["personal"]
        return own

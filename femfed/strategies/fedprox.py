"""FedProx: local steps are pulled back towards the global weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from femfed import UserError
from femfed.strategies.base import Strategy


@dataclass(frozen=True)
class FedProx(Strategy):
    """Federated averaging whose clients minimise `loss + proximal_mu / 2 * ||w - w_global||^2`.

    ```
    client:  g <- g + proximal_mu * (w - w_global)       every local step
    ```

    The gradient of the proximal term is added as it stands, so no norm is differentiated (which
    would be NaN at the first step, where `w = w_global`). `proximal_mu=0` is FedAvg bit for bit.

    Source: T. Li, A. K. Sahu, M. Zaheer, M. Sanjabi, A. Talwalkar, V. Smith, "Federated
    Optimization in Heterogeneous Networks", MLSys 2020, https://arxiv.org/abs/1812.06127

    Attributes:
        proximal_mu: strength of the pull, at least 0; the paper tries 0.001, 0.01, 0.1 and 1.
    """

    proximal_mu: float

    def __post_init__(self) -> None:
        if not 0 <= self.proximal_mu < float("inf"):
            raise UserError(f"strategy.proximal_mu={self.proximal_mu}; expected at least 0")

    def correct_gradients(
        self,
        gradients: Sequence[Any],
        weights: Sequence[Any],
        global_weights: Sequence[Any],
        memory: dict[str, Any],
        state: dict[str, Any],
    ) -> Sequence[Any]:
        """Return `g + proximal_mu * (w - w_global)`."""
        return [
            g + self.proximal_mu * (w - w_global)
            for g, w, w_global in zip(gradients, weights, global_weights, strict=True)
        ]

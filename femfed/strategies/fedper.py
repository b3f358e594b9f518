"""FedPer: a shared body, and a head that stays with the client."""

from dataclasses import dataclass

from femfed import UserError
from femfed.strategies.base import PersonalHead


@dataclass(frozen=True)
class FedPer(PersonalHead):
    """Federated averaging of all layers but the last, which every client keeps to itself.

    ```
    client:  w <- (body of the global weights, own head);  local steps on both;  keep the head
    server:  body <- FedAvg
    ```

    A client's first head is that of the initial weights. The head of the global weights is the
    mean of the heads that clients came to: the paper has none, but a writer who never took part
    could not be tested without; no client trains from it.

    Source: M. G. Arivazhagan, V. Aggarwal, A. K. Singh, S. Choudhary, "Federated Learning with
    Personalization Layers", 2019, https://arxiv.org/abs/1912.00818

    Attributes:
        personal_arrays: weight arrays that are the head, counted from the end, at least 1; a dense
            layer has two, its kernel and its bias.
    """

    personal_arrays: int

    def __post_init__(self) -> None:
        if not self.personal_arrays >= 1:
            raise UserError(f"strategy.personal_arrays={self.personal_arrays}; expected at least 1")

    @property
    def head(self) -> int:
        """How many weight arrays are the head."""
        return self.personal_arrays

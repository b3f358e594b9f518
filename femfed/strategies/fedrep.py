"""FedRep: a shared representation, and a head that is fitted to it first."""

from dataclasses import dataclass

from femfed import UserError
from femfed.strategies.base import PersonalHead


@dataclass(frozen=True)
class FedRep(PersonalHead):
    """Each client fits its own head to the shared body, then improves the body under that head.

    ```
    client:  w <- (body of the global weights, own head)
             the first head_share of the local steps on the head alone, the others on the body
             keep the head
    server:  body <- FedAvg
    ```

    A client's first head is that of the initial weights. The head of the global weights is the
    mean of the heads that clients came to, for testing writers who never took part; no client
    trains from it.

    Source: L. Collins, H. Hassani, A. Mokhtari, S. Shakkottai, "Exploiting Shared Representations
    for Personalized Federated Learning", ICML 2021, https://arxiv.org/abs/2102.07078

    Attributes:
        personal_arrays: weight arrays that are the head, counted from the end, at least 1; a dense
            layer has two, its kernel and its bias.
        head_share: of the local steps, in (0, 1); the paper trains the head for 10 epochs and the
            body for one, which is 10/11 of `local.epochs=11`.
    """

    personal_arrays: int
    head_share: float

    def __post_init__(self) -> None:
        if not self.personal_arrays >= 1:
            raise UserError(f"strategy.personal_arrays={self.personal_arrays}; expected at least 1")
        if not 0 < self.head_share < 1:
            raise UserError(f"strategy.head_share={self.head_share}; expected above 0 and below 1")

    @property
    def head(self) -> int:
        """How many weight arrays are the head."""
        return self.personal_arrays

    def phases(self, weights: int) -> tuple[tuple[float, tuple[int, ...]], ...]:
        """Keep the body still at first, then the head."""
        body = weights - self.personal_arrays
        return ((self.head_share, tuple(range(body))), (1.0, tuple(range(body, weights))))

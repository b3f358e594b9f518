"""Fine-tuning: federated averaging whose model every writer adapts before using it."""

from dataclasses import dataclass

from femfed import UserError
from femfed.strategies.base import Strategy


@dataclass(frozen=True)
class FineTuning(Strategy):
    """Federated averaging, evaluated after a few local steps on each writer's training images.

    ```
    evaluation:  v <- w;  v <- v - learning_rate * g(v)   adaptation_steps times;  test v
    ```

    Training is FedAvg's bit for bit. The steps use the client's batches and learning rate, without
    dropout, and nothing of them is kept. Unseen writers adapt as well: to the images they would
    have trained on, and are tested on the others. `adaptation_steps=0` is FedAvg.

    Source: T. Yu, E. Bagdasaryan, V. Shmatikov, "Salvaging Federated Learning by Local
    Adaptation", 2020, https://arxiv.org/abs/2002.04758; G. Cheng, K. Chadha, J. Duchi, "Federated
    Asymptotics: a model to compare federated learning algorithms", 2021,
    https://arxiv.org/abs/2108.07313

    Attributes:
        adaptation_steps: local steps before a writer's evaluation, at least 0.
    """

    adaptation_steps: int

    def __post_init__(self) -> None:
        if not self.adaptation_steps >= 0:
            raise UserError(
                f"strategy.adaptation_steps={self.adaptation_steps}; expected at least 0"
            )

    @property
    def tuning_steps(self) -> int:
        """Local steps before a writer's evaluation."""
        return self.adaptation_steps

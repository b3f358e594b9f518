"""Weights, Update and Strategy; a Strategy that overrides nothing is FedAvg."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Weights = list[NDArray[np.float32]]
State = dict[str, Weights]


@dataclass(frozen=True)
class Outcome:
    """What training or evaluating one writer came to: sums over images, never means.

    Attributes:
        examples: images trained on or evaluated.
        loss_sum: cross-entropy summed over the images (in training: over the last local epoch).
        correct: images classified correctly.
    """

    examples: int
    loss_sum: float
    correct: int


@dataclass(frozen=True)
class Update(Outcome):
    """What a client sends back.

    Attributes:
        client: which client of the federation.
        delta: local minus global weights.
    """

    client: int
    delta: Weights


@dataclass(frozen=True)
class Strategy:
    """Federated averaging, and the four places where another algorithm differs from it.

    ```
    client:  w <- w - learning_rate * g                  every local step
    server:  delta = sum_i n_i (w_i - w) / sum_i n_i     n_i = examples of client i
             w <- w + delta
    ```

    Source: B. McMahan, E. Moore, D. Ramage, S. Hampson, B. Aguera y Arcas,
    "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
    https://arxiv.org/abs/1602.05629
    """

    @property
    def averages(self) -> bool:
        """Whether `aggregate` is the example-weighted mean below.

        If so the engine folds updates as they come, in memory that does not grow with the cohort;
        otherwise `aggregate` is given every update.
        """
        return type(self).aggregate is Strategy.aggregate

    def correct_gradients(
        self, gradients: Sequence[Any], weights: Sequence[Any], global_weights: Sequence[Any]
    ) -> Sequence[Any]:
        """Return the gradients a client steps along, at every local step.

        Called once while the local epoch is traced, with symbolic tensors: plain arithmetic only.

        Args:
            gradients: of the mean loss over the batch, one per weight.
            weights: the client's weights at this step.
            global_weights: the weights the round began with.
        """
        return gradients

    def aggregate(self, updates: Sequence[Update]) -> Weights:
        """Return one delta from many: the mean weighted by examples, summed in float64."""
        examples = sum(update.examples for update in updates)
        return [
            np.asarray(
                sum(u.examples * d.astype(np.float64) for u, d in zip(updates, layer, strict=True))
                / examples,
                np.float32,
            )
            for layer in zip(*(update.delta for update in updates), strict=True)
        ]

    def init(self, weights: Weights) -> State:
        """Return the server's state before the first round."""
        return {}

    def apply(self, weights: Weights, delta: Weights, state: State) -> tuple[Weights, State]:
        """Return the next global weights and state: `w + delta`."""
        return [w + d for w, d in zip(weights, delta, strict=True)], state

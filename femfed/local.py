"""How a client trains, and how updates become sums that are exact: all but the training itself.

Without TensorFlow, which only the workers need.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from femfed import RunError

# A weighted delta is rounded to a multiple of 2**-30 by adding and subtracting GRID. Sums of such
# multiples are exact in float64, and so depend on no order, as long as the sum of their magnitudes
# stays below LARGEST_SUM.
GRID = 1.5 * 2.0**22
LARGEST_SUM = 2.0**21


@dataclass(frozen=True)
class Local:
    """How a client trains.

    Attributes:
        epochs: passes over the writer's images.
        batch_size: images a step; the last, shorter batch of an epoch is trained on as well.
        learning_rate: of plain SGD.
        momentum: in [0, 1); the velocity starts at zero for every client and round.
        weight_decay: added to the gradient as `weight_decay * w`.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    momentum: float
    weight_decay: float

    def steps(self, examples: int) -> float:
        """Return a client's local steps, with momentum `||a||_1` of the FedNova paper.

        ```
        a = number of steps                                        without momentum
        a = (steps - m (1 - m^steps) / (1 - m)) / (1 - m)          m = momentum
        ```

        Source: J. Wang, Q. Liu, H. Liang, G. Joshi, H. V. Poor, "Tackling the Objective
        Inconsistency Problem in Heterogeneous Federated Optimization", NeurIPS 2020,
        https://arxiv.org/abs/2007.07481
        """
        steps, m = float(self.epochs * -(-examples // self.batch_size)), self.momentum
        return (steps - m * (1 - m**steps) / (1 - m)) / (1 - m) if m else steps


class DivergedError(RunError):
    """A client's training left the finite numbers."""

    def __str__(self) -> str:
        return f"{super().__str__()}; the run diverged, try a smaller local.learning_rate"


def flatten(
    weights: Sequence[NDArray[np.float32]], out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Return all weights in order as one vector: `out`, or a new one."""
    return np.concatenate([layer.ravel() for layer in weights], out=out)


def unflatten(vector: NDArray[Any], shapes: Sequence[tuple[int, ...]]) -> list[NDArray[Any]]:
    """Return the layers of `vector` as views."""
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
    if ends[-1] != vector.size:
        raise ValueError(f"{vector.size} weights; expected {ends[-1]} for layers {shapes}")
    starts = [0, *ends[:-1]]
    return [vector[a:b].reshape(s) for a, b, s in zip(starts, ends, shapes, strict=True)]


def is_finite(array: NDArray[np.float32]) -> bool:
    """Return whether no number is NaN or infinite."""
    square = np.vdot(array, array)  # half the time of what decides where numbers are huge
    return bool(np.isfinite(square) or np.isfinite(array).all())

"""Weights, Update and Strategy; a Strategy that overrides nothing is FedAvg."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from femfed import UserError

Weights = list[NDArray[np.float32]]
State = dict[str, Weights]
Array = NDArray[np.float32]

PIECE = 2**16  # numbers handled at a time: what NumPy leaves on its way stays in the core's cache
Memory = dict[str, Weights]

# The weight of every client where all count alike. Sums are rounded to multiples of 2**-30; about
# as heavy as a writer's examples, and a power of two, it costs no digit of a small update.
ALIKE = 256.0


@dataclass(frozen=True)
class Outcome:
    """What training or evaluating one writer came to: sums over images, never means.

    Attributes:
        examples: images trained on or evaluated.
        loss_sum: cross-entropy summed over the images (in training: over the last local epoch).
        correct: images classified correctly.
        steps: local steps; with client momentum, how often all gradients together entered the
            update (the norm `||a_i||_1` of the FedNova paper).
        loss_before: mean loss of the global weights on the training images, where a strategy
            `needs` it.
        squared_norm: of the delta, where a strategy `needs` it.
    """

    examples: int
    loss_sum: float
    correct: int
    steps: float = 0.0
    loss_before: float = 0.0
    squared_norm: float = 0.0


@dataclass(frozen=True)
class Update(Outcome):
    """What a client sends back.

    Attributes:
        client: which client of the federation.
        delta: local minus global weights.
        read: given a coordinate and an array, reads all layers as one vector from there on; what
            follows the last one is no coordinate's. Both are multiples of 1,024, and the array
            begins where a page of memory does. Where updates are too many for the memory that is
            faster than to look into `delta`; elsewhere None.
    """

    client: int = -1
    delta: Weights = ()  # type: ignore[assignment]  # always given; the fields before have defaults
    read: Callable[[int, Array], None] | None = None


@dataclass(frozen=True)
class Cohort:
    """What the server knows of a round's clients besides the mean of their updates.

    Attributes:
        outcomes: of the clients that completed the round.
        drawn: clients drawn for the round; more than `outcomes` where some failed.
        clients: clients of the federation.
        most_steps: the most local steps that a client of the cohort took, or would have taken.
        weight_sum: sum of the clients' `Strategy.weight`.
        extra: mean of what clients sent besides their deltas, weighted as these; empty without.
    """

    outcomes: Sequence[Outcome]
    drawn: int
    clients: int
    most_steps: float
    weight_sum: float
    extra: Weights


@dataclass(frozen=True)
class Strategy:
    """Federated averaging, and the places where another algorithm differs from it.

    ```
    client:  w <- w - learning_rate * g                  every local step
    server:  delta = sum_i n_i (w_i - w) / sum_i n_i     n_i = examples of client i
             w <- w + delta
    ```

    The client's half is traced into the compiled local epoch with symbolic tensors, so it uses
    plain arithmetic only, which NumPy arrays understand as well. What it is given as `memory` and
    `state` are dictionaries of lists like the weights.

    Source: B. McMahan, E. Moore, D. Ramage, S. Hampson, B. Aguera y Arcas,
    "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
    https://arxiv.org/abs/1602.05629
    """

    broadcasts: ClassVar[tuple[str, ...]] = ()
    """Entries of the server's state that clients are sent along with the weights."""
    sends_extra: ClassVar[bool] = False
    """Whether `finish` returns a second vector to be averaged like the delta."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """What costs a client more than training: `loss` (of the global weights on its training
    images), `gradient` (of that loss) and `norm` (of its delta)."""
    exchanges: ClassVar[bool] = True
    """Whether clients and server exchange weights at all."""
    pools: ClassVar[bool] = False
    """Whether one model is trained on all clients' images together, in as many steps."""

    @property
    def averages(self) -> bool:
        """Whether updates are combined by the weighted mean below.

        If so the engine folds updates as they come, in memory that does not grow with the cohort;
        otherwise `combine` is given every update.
        """
        ours = type(self)
        return ours.aggregate is Strategy.aggregate and ours.combine is Strategy.combine

    @property
    def sums(self) -> bool:
        """Whether the engine adds up updates: where they are averaged, and anybody sends one."""
        return self.averages and (self.exchanges or self.pools)

    @property
    def remembers(self) -> bool:
        """Whether clients keep something from round to round."""
        return type(self).new_memory is not Strategy.new_memory

    @property
    def personalises(self) -> bool:
        """Whether a client is evaluated with other weights than the global ones."""
        return type(self).personal_weights is not Strategy.personal_weights

    @property
    def tuning_steps(self) -> int:
        """Local steps on a writer's training images before its evaluation."""
        return 0

    # The client's half ---------------------------------------------------------------------------

    def new_memory(self, weights: Weights) -> Memory:
        """Return what a client remembers before its first round.

        Args:
            weights: the initial weights of the run.
        """
        return {}

    def begin(self, global_weights: Sequence[Any], memory: dict[str, Any]) -> Sequence[Any]:
        """Return the weights a client starts its local steps from: the global ones."""
        return global_weights

    def phases(self, weights: int) -> tuple[tuple[float, tuple[int, ...]], ...]:
        """Return the phases of the local steps: up to which share of them, and what keeps still.

        Args:
            weights: number of weight arrays of the model; a phase names some by position.
        """
        return ()

    def correct_gradients(
        self,
        gradients: Sequence[Any],
        weights: Sequence[Any],
        global_weights: Sequence[Any],
        memory: dict[str, Any],
        state: dict[str, Any],
    ) -> Sequence[Any]:
        """Return the gradients a client steps along, at every local step.

        Called with names as well (`femfed.linear`), so it depends on its arguments only. If a large
        kernel's gradient becomes a sum of itself and arrays like it, each times a number, the
        kernel need not be rewritten at every step.

        Args:
            gradients: of the mean loss over the batch, one per weight.
            weights: the client's weights at this step.
            global_weights: the weights the round began with.
            memory: what this client remembers.
            state: what the server broadcast.
        """
        return gradients

    def finish(
        self,
        weights: Sequence[Any],
        global_weights: Sequence[Any],
        memory: dict[str, Any],
        state: dict[str, Any],
        path: Any,
        gradient: Sequence[Any],
    ) -> tuple[dict[str, Any], Sequence[Any]]:
        """Return what a client remembers after its local steps, and what it sends besides.

        Args:
            weights: the client's weights after its last local step.
            global_weights: the weights the round began with.
            memory: what this client remembered.
            state: what the server broadcast.
            path: local steps times the client learning rate.
            gradient: of the mean loss over all training images at the global weights, where
                `needs` has it.
        """
        return memory, ()

    def correct_personal_gradients(
        self, gradients: Sequence[Any], weights: Sequence[Any], global_weights: Sequence[Any]
    ) -> Sequence[Any]:
        """Return the gradients along which a client trains a second model of its own.

        A strategy that overrides this has `memory["personal"]` trained by it every round, for as
        many steps and on the same batches as the shared model.
        """
        return gradients

    def personal_weights(self, global_weights: Sequence[Any], memory: Any) -> Sequence[Any]:
        """Return the weights that a client who took part is evaluated with: the global ones."""
        return global_weights

    # The server's half ---------------------------------------------------------------------------

    def weight(self, outcome: Outcome, most_steps: float) -> float:
        """Return how much a client counts in the mean: its examples.

        Args:
            outcome: the client's.
            most_steps: the most local steps that any client of the cohort takes.
        """
        return float(outcome.examples)

    def aggregate(self, updates: Sequence[Update]) -> Weights:
        """Return one delta from many: their weighted mean, summed in float64."""
        most_steps = max(update.steps for update in updates)
        weights = [self.weight(update, most_steps) for update in updates]
        return [
            np.asarray(
                sum(w * d.astype(np.float64) for w, d in zip(weights, layer, strict=True))
                / sum(weights),
                np.float32,
            )
            for layer in zip(*(update.delta for update in updates), strict=True)
        ]

    def init(self, weights: Weights) -> State:
        """Return the server's state before the first round."""
        return {}

    def apply(
        self, weights: Weights, delta: Weights, state: State, cohort: Cohort
    ) -> tuple[Weights, State]:
        """Return the next global weights and state: `w + delta`."""
        return [w + d for w, d in zip(weights, delta, strict=True)], state

    def combine(
        self, weights: Weights, updates: Sequence[Update], state: State, cohort: Cohort
    ) -> tuple[Weights, State]:
        """Return the next global weights and state from single updates, in the clients' order.

        Called instead of `apply` where a strategy does not average: `apply` of what `aggregate`
        makes of them.
        """
        return self.apply(weights, self.aggregate(updates), state, cohort)


def elementwise(step: Callable[..., Sequence[Array]], *lists: Weights) -> list[Weights]:
    """Return what `step` makes of arrays of the same shapes, element by element.

    ```
    stepped, velocity = elementwise(lambda w, d, v: (w + v + d, v + d), weights, delta, velocity)
    ```

    Args:
        step: given one piece of an array from each list, flattened; returns as long pieces, one for
            each list that is made.
        lists: like the weights.
    """
    made = []
    for arrays in zip(*lists, strict=True):
        flat, new = [array.reshape(-1) for array in arrays], list[Array]()
        for piece in pieces(max(1, flat[0].size)):
            values = step(*(array[piece] for array in flat))
            new = new or [np.empty(flat[0].size, value.dtype) for value in values]
            for array, value in zip(new, values, strict=True):
                array[piece] = value
        made.append([array.reshape(arrays[0].shape) for array in new])
    return [list(each) for each in zip(*made, strict=True)]


def moved(weights: Weights, delta: Weights, rate: float) -> Weights:
    """Return `w + rate * d`."""
    (stepped,) = elementwise(lambda w, d: (w + rate * d,), weights, delta)
    return stepped


def squared_norm(arrays: Iterable[Array]) -> float:
    """Return the sum of all squares, added up in float64."""
    squared = 0.0
    for array in arrays:
        flat = array.reshape(-1)
        for piece in pieces(flat.size):
            values = flat[piece].astype(np.float64)
            squared += float(values @ values)
    return squared


def pieces(size: int) -> Iterator[slice]:
    """Yield the places of `size` numbers, at most `PIECE` at a time."""
    return (slice(start, start + PIECE) for start in range(0, size, PIECE))


@dataclass(frozen=True)
class PersonalHead(Strategy):
    """Federated averaging of the body of a model, whose head every client keeps to itself.

    A client's first head is that of the initial weights. The head of the global weights is the
    mean of the heads that clients came to, for testing writers who never took part; no client
    trains from it.
    """

    @property
    def head(self) -> int:
        """How many weight arrays are the head, counted from the end."""
        raise NotImplementedError

    def new_memory(self, weights: Weights) -> Memory:
        """Return the initial head.

        Raises:
            UserError: it would be the whole model.
        """
        if self.head >= len(weights):
            raise UserError(
                f"a head of {self.head} weight arrays is the whole model; expected fewer than its "
                f"{len(weights)}, so that a body is shared"
            )
        return {"head": [array.copy() for array in weights[-self.head :]]}

    def begin(self, global_weights: Sequence[Any], memory: dict[str, Any]) -> Sequence[Any]:
        """Return the shared body and the client's own head."""
        return [*global_weights[: -self.head], *memory["head"]]

    def finish(
        self,
        weights: Sequence[Any],
        global_weights: Sequence[Any],
        memory: dict[str, Any],
        state: dict[str, Any],
        path: Any,
        gradient: Sequence[Any],
    ) -> tuple[dict[str, Any], Sequence[Any]]:
        """Keep the head."""
        return {"head": weights[-self.head :]}, ()

    def personal_weights(self, global_weights: Sequence[Any], memory: Any) -> Sequence[Any]:
        """Return the shared body and the client's own head."""
        return self.begin(global_weights, memory)

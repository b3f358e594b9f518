"""The client's side: one compiled local epoch that trains and evaluates writer after writer.

A worker process holds one `LocalTraining`. Its functions are traced once, for writers of every
size, and the whole of a client's training runs in one call: nothing returns to Python between
batches. What a client computes is a function of (global weights, writer, seed, round, client) and
of nothing else, neither of the worker nor of who was trained before.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from femfed import RunError, UserError
from femfed.data.store import Rows, Writer
from femfed.models import Model
from femfed.seeds import generator
from femfed.strategies.base import Outcome, Strategy, Weights

# A weighted delta is rounded to a multiple of 2**-30 by adding and subtracting GRID. Sums of such
# multiples are exact in float64, and so depend on no order, as long as the sum of their magnitudes
# stays below LARGEST_SUM.
GRID = 1.5 * 2.0**22
LARGEST_SUM = 2.0**21
_CHUNK = 65_536  # elements folded at a time: the temporaries stay in the core's second-level cache
_EVALUATION_BATCH = 512  # images; bounds the memory of a writer with thousands of them

FloatSum = NDArray[np.float64]


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


class DivergedError(RunError):
    """A client's training left the finite numbers."""


def flatten(weights: Weights) -> NDArray[np.float32]:
    """Return all weights in order as one vector."""
    return np.concatenate([layer.ravel() for layer in weights])


def unflatten(vector: NDArray[Any], shapes: Sequence[tuple[int, ...]]) -> list[NDArray[Any]]:
    """Return the layers of `vector` as views."""
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
    if ends[-1] != vector.size:
        raise ValueError(f"{vector.size} weights; expected {ends[-1]} for layers {shapes}")
    starts = [0, *ends[:-1]]
    return [vector[a:b].reshape(s) for a, b, s in zip(starts, ends, shapes, strict=True)]


class LocalTraining:
    """Trains and evaluates one writer at a time with the model and the functions it holds.

    Args:
        model: what to train.
        strategy: corrects the gradients of every local step.
        local: epochs, batches and the optimizer.
        seed: seed of the run.
    """

    def __init__(self, model: Model, strategy: Strategy, local: Local, seed: int) -> None:
        self._strategy, self._local, self._seed = strategy, local, seed
        self.model = model.build(seed)
        self._weights = [variable.value for variable in self.model.trainable_variables]
        if len(self._weights) != len(self.model.weights):
            raise UserError(
                "the model has weights that are not trained (batch normalisation, say); "
                "expected a model whose weights are all trainable"
            )
        self.shapes = [tuple(int(side) for side in w.shape) for w in self._weights]
        self.parameters = sum(int(np.prod(shape)) for shape in self.shapes)
        self._global_weights = [tf.Variable(w, trainable=False) for w in self._weights]
        self._velocity = [
            tf.Variable(tf.zeros_like(w), trainable=False) for w in self._weights if local.momentum
        ]
        self._dropout_states = [
            layer.seed_generator.state
            for layer in self.model.layers
            if isinstance(layer, keras.layers.Dropout) and layer.rate > 0
        ]
        images = tf.TensorSpec([None, 28, 28], tf.uint8)
        labels = tf.TensorSpec([None], tf.uint8)
        self._train = tf.function(
            self._local_epochs,
            input_signature=[
                images,
                labels,
                tf.TensorSpec([None, None], tf.int32),
                tf.TensorSpec([len(self._dropout_states)], tf.int32),
            ],
            autograph=False,  # it reads source code, and fails where a warning is an error
        )
        self._evaluate = tf.function(
            self._evaluate_rows,
            input_signature=[images, labels, tf.TensorSpec([None], tf.int32)],
            autograph=False,
        )
        self._term = np.empty(_CHUNK, np.float64)
        self._delta = np.empty(_CHUNK, np.float32)

    @property
    def traces(self) -> int:
        """How often the local epoch was traced; more than once is a defect."""
        return int(self._train.experimental_get_tracing_count())

    def load(self, vector: NDArray[np.float32]) -> None:
        """Take `vector` as the global weights of the clients to come."""
        layers = unflatten(vector, self.shapes)
        for variable, layer in zip(self._global_weights, layers, strict=True):
            variable.assign(layer)

    def initial_weights(self) -> Weights:
        """Return the weights the model was built with; call it before training."""
        return [variable.numpy() for variable in self._weights]

    def train(self, writer: Writer, round: int, client: int) -> Outcome:
        """Train from the global weights on one writer; the result stays here, to be folded.

        Raises:
            DivergedError: the training loss is NaN or infinite.
        """
        draw = generator(self._seed, "batches", round, client)
        order = np.stack([draw.permutation(writer.train) for _ in range(self._local.epochs)])
        dropout = generator(self._seed, "dropout", round, client)
        seeds = dropout.integers(2**31, size=len(self._dropout_states), dtype=np.int32)
        loss_sum, correct = self._train(writer.images, writer.labels, order, seeds)
        outcome = Outcome(len(writer.train), float(loss_sum), int(correct))
        if not np.isfinite(outcome.loss_sum):
            raise DivergedError(f"training loss is {outcome.loss_sum}")
        return outcome

    def evaluate(self, writer: Writer, rows: Rows) -> Outcome:
        """Evaluate the global weights on `rows` of one writer's images."""
        if not len(rows):
            return Outcome(0, 0.0, 0)
        loss_sum, correct = self._evaluate(writer.images, writer.labels, rows)
        return Outcome(len(rows), float(loss_sum), int(correct))

    def fold(self, examples: int, total: FloatSum, *, first: bool) -> float:
        """Add `examples * (w - w_global)` of the client just trained to `total`.

        Every term is rounded to a multiple of 2**-30, so that the sum over a cohort is exact and
        does not depend on the order, nor on which worker added what.

        Args:
            examples: the client's weight.
            total: `[parameters]`, changed in place.
            first: overwrite `total` instead of adding to it.

        Returns:
            The largest magnitude that was added. The sum of these over a cohort has to stay below
            LARGEST_SUM.

        Raises:
            DivergedError: the update holds NaN, infinity or numbers beyond LARGEST_SUM.
        """
        weight, start, largest = np.float64(examples), 0, 0.0
        for delta in self._delta_chunks():
            magnitude = float(weight * max(delta.max(), -delta.min()))  # NaN if one element is
            if not magnitude < LARGEST_SUM:
                raise DivergedError(
                    f"the update times its {examples} examples reaches {magnitude:.3g}; "
                    f"expected less than {LARGEST_SUM:.0f}"
                )
            largest = max(largest, magnitude)
            term = self._term[: delta.size]
            term[:] = delta
            term *= weight
            term += GRID
            term -= GRID
            target = total[start : start + delta.size]
            if first:
                target[:] = term
            else:
                target += term
            start += delta.size
        return largest

    def delta(self, vector: NDArray[np.float32]) -> None:
        """Write `w - w_global` of the client just trained to `vector`, `[parameters]`.

        Raises:
            DivergedError: the update holds NaN or infinity.
        """
        start = 0
        for delta in self._delta_chunks():
            vector[start : start + delta.size] = delta
            start += delta.size
        if not np.isfinite(vector).all():
            raise DivergedError("the update holds NaN or infinity")

    def _delta_chunks(self) -> Iterator[NDArray[np.float32]]:
        """Yield `w - w_global` in order, at most `_CHUNK` at a time; each overwrites the last."""
        for local, origin in zip(self._weights, self._global_weights, strict=True):
            w, w_global = _view(local), _view(origin)
            for start in range(0, w.size, _CHUNK):
                stop = min(start + _CHUNK, w.size)
                delta = self._delta[: stop - start]
                np.subtract(w[start:stop], w_global[start:stop], out=delta)
                yield delta

    def _local_epochs(
        self, images: tf.Tensor, labels: tf.Tensor, order: tf.Tensor, dropout_seeds: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Train on the rows `order` (`[epochs, n]`) from the global weights; traced once."""
        local = self._local
        for weight, origin in zip(self._weights, self._global_weights, strict=True):
            weight.assign(origin)
        for velocity in self._velocity:
            velocity.assign(tf.zeros_like(velocity))
        for place, state in enumerate(self._dropout_states):
            state.assign(tf.cast(tf.stack([dropout_seeds[place], 0]), state.dtype))
        epochs, n = tf.shape(order)[0], tf.shape(order)[1]
        steps = (n + local.batch_size - 1) // local.batch_size

        def step_once(step: tf.Tensor, loss_sum: tf.Tensor, correct: tf.Tensor) -> Any:
            epoch, start = step // steps, step % steps * local.batch_size
            rows = order[epoch, start : start + local.batch_size]
            targets = tf.cast(tf.gather(labels, rows), tf.int32)
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(self._weights)
                logits = self.model(_pixels(images, rows), training=True)
                losses = tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits)
                loss = tf.reduce_mean(losses)
            gradients = tape.gradient(loss, self._weights)
            if local.weight_decay:
                gradients = [
                    g + local.weight_decay * w
                    for g, w in zip(gradients, self._weights, strict=True)
                ]
            gradients = self._strategy.correct_gradients(
                gradients, self._weights, self._global_weights
            )
            self._step(gradients)
            in_last_epoch = epoch == epochs - 1
            loss_sum += tf.where(in_last_epoch, tf.reduce_sum(losses), 0.0)
            correct += tf.where(in_last_epoch, _hits(logits, targets), 0)
            return step + 1, loss_sum, correct

        _, loss_sum, correct = tf.while_loop(
            lambda step, *_: step < epochs * steps,
            step_once,
            [tf.constant(0), tf.constant(0.0), tf.constant(0)],
            parallel_iterations=1,
        )
        return loss_sum, correct

    def _step(self, gradients: Sequence[tf.Tensor]) -> None:
        """Take one step of SGD with the fused kernels, which are faster than `assign_sub`."""
        rate = self._local.learning_rate
        if self._velocity:
            momentum = self._local.momentum
            for weight, velocity, gradient in zip(
                self._weights, self._velocity, gradients, strict=True
            ):
                tf.raw_ops.ResourceApplyMomentum(
                    var=weight.handle,
                    accum=velocity.handle,
                    lr=rate,
                    grad=gradient,
                    momentum=momentum,
                )
            return
        for weight, gradient in zip(self._weights, gradients, strict=True):
            tf.raw_ops.ResourceApplyGradientDescent(var=weight.handle, alpha=rate, delta=gradient)

    def _evaluate_rows(
        self, images: tf.Tensor, labels: tf.Tensor, rows: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Evaluate the global weights on `rows` (`[n]`); traced once."""
        for weight, origin in zip(self._weights, self._global_weights, strict=True):
            weight.assign(origin)

        def batch_once(start: tf.Tensor, loss_sum: tf.Tensor, correct: tf.Tensor) -> Any:
            batch = rows[start : start + _EVALUATION_BATCH]
            targets = tf.cast(tf.gather(labels, batch), tf.int32)
            logits = self.model(_pixels(images, batch), training=False)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits)
            loss_sum += tf.reduce_sum(losses)
            correct += _hits(logits, targets)
            return start + _EVALUATION_BATCH, loss_sum, correct

        _, loss_sum, correct = tf.while_loop(
            lambda start, *_: start < tf.shape(rows)[0],
            batch_once,
            [tf.constant(0), tf.constant(0.0), tf.constant(0)],
            parallel_iterations=1,
        )
        return loss_sum, correct


def _pixels(images: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
    """Return the images in `rows` as `[n, 28, 28, 1]` float32 in 0..1."""
    return tf.cast(tf.gather(images, rows), tf.float32)[..., tf.newaxis] / 255.0


def _hits(logits: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    predicted = tf.argmax(logits, axis=-1, output_type=tf.int32)
    return tf.reduce_sum(tf.cast(predicted == targets, tf.int32))


def _view(variable: tf.Variable) -> NDArray[np.float32]:
    """Return a variable's values as a flat, read-only view; drop it before the next step."""
    return np.asarray(memoryview(variable.read_value())).reshape(-1)

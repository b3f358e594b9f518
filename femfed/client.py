"""The client's side: one compiled local epoch that trains and evaluates writer after writer.

A worker process holds one `LocalTraining`. Its functions are traced once, for writers of every
size, and the whole of a client's training runs in one call: nothing returns to Python between
batches. What a client computes is a function of (global weights, writer, seed, round, client) and
of nothing else, neither of the worker nor of who was trained before.
"""

import contextlib
import functools
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numba
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from femfed import keep_freed_memory
from femfed.data.store import Rows, Writer
from femfed.deferred import Correct, Deferred, Kept, KnownAs, corrections_of
from femfed.forward import Dropouts, drops, forward
from femfed.local import GRID, LARGEST_SUM, DivergedError, Local, is_finite, unflatten
from femfed.models import Model, build_checked, layers_of
from femfed.seeds import generator
from femfed.strategies.base import PIECE, Outcome, Strategy, Weights, pieces, squared_norm

with contextlib.suppress(RuntimeError):  # TensorFlow has begun to use them for another program
    tf.config.set_visible_devices([], "GPU")  # a worker would take all of a GPU's memory

_GRADIENT_BATCH = 128  # images; bounds the memory of a full gradient
_EVALUATION_BATCH = 512  # images; bounds the memory of a writer with thousands of them

FloatSum = NDArray[np.float64]
Step = Callable[..., tuple[tf.Tensor, tf.Tensor, tf.Tensor, list[Kept]]]


class LocalTraining:
    """Trains and evaluates one writer at a time with the model and the functions it holds.

    Args:
        model: what to train.
        strategy: corrects the gradients of every local step.
        local: epochs, batches and the optimizer.
        seed: seed of the run.
        precision: `float32`, or `bfloat16` for activations and products.
    """

    def __init__(
        self,
        model: Model,
        strategy: Strategy,
        local: Local,
        seed: int,
        precision: str = "float32",
    ) -> None:
        keep_freed_memory()
        self._model, self._strategy, self._local, self._seed = model, strategy, local, seed
        self.model = build_checked(model, seed, precision)
        self._layers = layers_of(self.model)
        self._weights = [variable.value for variable in self.model.trainable_variables]
        self.shapes = [tuple(int(side) for side in w.shape) for w in self._weights]
        self.parameters = sum(int(np.prod(shape)) for shape in self.shapes)
        self._global_weights = [tf.Variable(w, trainable=False) for w in self._weights]
        self._initial = [variable.numpy() for variable in self._weights]
        self._state = {name: self._like_weights() for name in strategy.broadcasts}
        self._extra = self._like_weights() if strategy.sends_extra else []
        self._gradient = self._like_weights() if "gradient" in strategy.needs else []
        self._memory = {
            name: [tf.Variable(array, trainable=False) for array in arrays]
            for name, arrays in strategy.new_memory(self._initial).items()
        }
        self._velocity = [
            tf.Variable(tf.zeros_like(w), trainable=False) for w in self._weights if local.momentum
        ]
        self._dropping = sum(drops(layer) for layer in self._layers)
        only_update = self._begins_globally and type(strategy).finish is Strategy.finish
        self._deferred = self._defer(
            self._corrected, begins_globally=self._begins_globally, only_update=only_update
        )
        self._personal_deferred = (
            self._defer(self._personally_corrected, begins_globally=False, only_update=False)
            if self._trains_personal
            else []
        )
        images = tf.TensorSpec([None, 28, 28], tf.uint8)
        labels = tf.TensorSpec([None], tf.uint8)
        order = tf.TensorSpec([None, None], tf.int32)
        self._data_specs = [images, labels, order, tf.TensorSpec([self._dropping], tf.int32)]
        self._train = tf.function(
            self._local_epochs,
            input_signature=self._data_specs,
            autograph=False,  # it reads source code, and fails where a warning is an error
        )
        rows = tf.TensorSpec([None], tf.int32)
        self._evaluate = tf.function(
            self._evaluate_global, input_signature=[images, labels, rows], autograph=False
        )
        self._evaluate_own = tf.function(
            self._evaluate_personal,
            input_signature=[images, labels, rows, tf.TensorSpec([None], tf.int32)],
            autograph=False,
        )
        self._delta = np.empty(PIECE, np.float32)

    @property
    def _begins_globally(self) -> bool:
        """Whether clients begin from the global weights."""
        return type(self._strategy).begin is Strategy.begin

    @property
    def _trains_personal(self) -> bool:
        """Whether clients train a second model of their own."""
        ours = type(self._strategy).correct_personal_gradients
        return ours is not Strategy.correct_personal_gradients

    @property
    def traces(self) -> int:
        """How often the local epoch was traced; more than once is a defect."""
        return int(self._train.experimental_get_tracing_count())

    def load(self, vector: NDArray[np.float32]) -> None:
        """Take the global weights, and what the strategy broadcasts with them, from `vector`.

        Where it lies as TensorFlow wants it, it is lent, not copied: whoever changes it has to call
        this again before anything else is.
        """
        shared = [self._global_weights, *self._state.values()]
        for variables, part in zip(shared, np.split(vector, len(shared)), strict=True):
            _lend(variables, part)
        for each in self._deferred:
            each.forget()

    @property
    def initial_weights(self) -> Weights:
        """The weights the model was built with."""
        return self._initial

    def save(self, path: Path) -> None:
        """Save the global weights as a model of plain Keras, in float32 whatever the precision."""
        plain = build_checked(self._model, self._seed)
        plain.set_weights([variable.numpy() for variable in self._global_weights])
        partial = path.with_name(f".{path.name}.{os.getpid()}.keras")
        try:
            plain.save(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def load_memory(self, vector: NDArray[np.float32] | None) -> None:
        """Take `vector` as what the next client remembers, None for a client that is new."""
        if vector is None:
            fresh = self._strategy.new_memory(self._initial)
            for name, variables in self._memory.items():
                _assign(variables, fresh[name])
            return
        _lend([variable for each in self._memory.values() for variable in each], vector)

    def memory(self) -> list[NDArray[np.float32]]:
        """Return what the client just trained remembers, flat and read-only, until the next one."""
        return [_view(v) for each in self._memory.values() for v in each]

    def train(self, writer: Writer, round: int, client: int, epochs: int | None = None) -> Outcome:
        """Train from the global weights on one writer; the result stays here, to be folded.

        What the client remembers is taken from `load_memory` and left for `memory`.

        Args:
            writer: whose images.
            round: the round.
            client: which client of the federation; batches and dropout are drawn by these two.
            epochs: local epochs, other than those of all clients.

        Raises:
            DivergedError: the training loss is NaN or infinite.
        """
        loss_before = 0.0
        if "loss" in self._strategy.needs:
            before, _ = self._evaluate(writer.images, writer.labels, writer.train)
            loss_before = float(before) / len(writer.train)
        draw = generator(self._seed, "batches", round, client)
        local = replace(self._local, epochs=epochs or self._local.epochs)
        order = np.stack([draw.permutation(writer.train) for _ in range(local.epochs)])
        dropout = generator(self._seed, "dropout", round, client)
        seeds = dropout.integers(2**31, size=self._dropping, dtype=np.int32)
        _ = self._shared_step, self._personal_step  # traced before `_local_epochs`, not within
        loss_sum, correct = self._train(writer.images, writer.labels, order, seeds)
        outcome = Outcome(
            examples=len(writer.train),
            loss_sum=float(loss_sum),
            correct=int(correct),
            steps=local.steps(len(writer.train)),
            loss_before=loss_before,
        )
        if "norm" in self._strategy.needs:
            outcome = replace(outcome, squared_norm=squared_norm(self._delta_chunks()))
        if not np.isfinite(outcome.loss_sum):
            raise DivergedError(f"training loss is {outcome.loss_sum}")
        return outcome

    def evaluate(self, writer: Writer, rows: Rows) -> Outcome:
        """Evaluate the global weights on `rows` of one writer's images."""
        if not len(rows):
            return Outcome(0, 0.0, 0)
        loss_sum, correct = self._evaluate(writer.images, writer.labels, rows)
        return Outcome(len(rows), float(loss_sum), int(correct))

    def evaluate_personal(self, writer: Writer, index: int) -> Outcome:
        """Evaluate the writer's own weights on its held-out images.

        These come from what it remembers (`load_memory`) and from `tuning_steps` on its training
        images.

        Args:
            writer: whose.
            index: the writer's place in the store, which its batches are drawn by.
        """
        if not len(writer.test):
            return Outcome(0, 0.0, 0)
        size = self._strategy.tuning_steps * self._local.batch_size if len(writer.train) else 0
        draw = generator(self._seed, "tuning", client=index)
        passes = -(-size // max(1, len(writer.train)))
        tuning = [writer.train[:0], *(draw.permutation(writer.train) for _ in range(passes))]
        order = np.concatenate(tuning)[:size]
        loss_sum, correct = self._evaluate_own(writer.images, writer.labels, writer.test, order)
        return Outcome(len(writer.test), float(loss_sum), int(correct))

    def fold(self, weight: float, total: FloatSum, *, first: bool) -> float:
        """Add `weight * (w - w_global)` of the client just trained to `total`.

        What the client sends besides (`Strategy.sends_extra`) follows, of the same weight.

        Every term is rounded to a multiple of 2**-30, so that the sum over a cohort is exact and
        does not depend on the order, nor on which worker added what.

        Args:
            weight: of the client in the mean.
            total: `[parameters]`, or twice as many with an extra vector; changed in place.
            first: overwrite `total` instead of adding to it.

        Returns:
            A bound of the largest magnitude that was added. The sum of these over a cohort has to
            stay below LARGEST_SUM.

        Raises:
            DivergedError: the update holds NaN, infinity or numbers beyond LARGEST_SUM.
        """
        start, largest = 0, 0.0
        for delta in chain(self._delta_chunks(), self._extra_chunks()):
            largest = max(largest, _magnitude(weight, delta))
            _add_exactly(total[start : start + delta.size], weight, delta, first)
            start += delta.size
        return largest

    def check(self, weight: float) -> None:
        """Raise what `fold` would raise, before it has added anything."""
        for delta in chain(self._delta_chunks(), self._extra_chunks()):
            _magnitude(weight, delta)

    def delta(self, vector: NDArray[np.float32]) -> None:
        """Write `w - w_global` of the client just trained to `vector`, `[parameters]`.

        Raises:
            DivergedError: the update holds NaN or infinity.
        """
        start = 0
        for delta in self._delta_chunks():
            vector[start : start + delta.size] = delta
            start += delta.size
        if not is_finite(vector):
            raise DivergedError("the update holds NaN or infinity")

    def _delta_chunks(self) -> Iterator[NDArray[np.float32]]:
        """Yield `w - w_global` in order, at most `PIECE` at a time; each overwrites the last."""
        weights = zip(self._weights, self._global_weights, self._updates(), strict=True)
        for local, origin, update in weights:
            if update is not None:
                yield from self._chunks(update)
                continue
            w, w_global = _view(local), _view(origin)
            for piece in pieces(w.size):
                delta = self._delta[: w[piece].size]
                np.subtract(w[piece], w_global[piece], out=delta)
                yield delta

    def _updates(self) -> list[tf.Variable | None]:
        """Return for each weight the variable that holds `w - w_global`, if one does."""
        updates = {id(each.kernel): each.update for each in self._deferred}
        return [updates.get(id(weight)) for weight in self._weights]

    def _chunks(self, variable: tf.Variable) -> Iterator[NDArray[np.float32]]:
        """Yield a variable's values in float32, at most `PIECE` at a time."""
        if variable.dtype == tf.float32:
            vector = _view(variable)
            yield from (vector[piece] for piece in pieces(vector.size))
            return
        halves = np.asarray(memoryview(tf.bitcast(variable, tf.uint16))).reshape(-1)
        for piece in pieces(halves.size):
            delta = self._delta[: halves[piece].size]
            bits = delta.view(np.uint32)
            bits[:] = halves[piece]
            bits <<= 16  # bfloat16 is the upper half of a float32
            yield delta

    def _extra_chunks(self) -> Iterator[NDArray[np.float32]]:
        """Yield what is sent besides the delta in order, at most `PIECE` at a time."""
        return chain.from_iterable(self._chunks(variable) for variable in self._extra)

    def _like_weights(self) -> list[tf.Variable]:
        return [tf.Variable(tf.zeros_like(w), trainable=False) for w in self._weights]

    def _local_epochs(
        self, images: tf.Tensor, labels: tf.Tensor, order: tf.Tensor, dropout_seeds: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Train on the rows `order` (`[epochs, n]`) from the global weights; traced once."""
        strategy, origin, memory = self._strategy, self._global_weights, self._memory
        data = images, labels, order, dropout_seeds
        if self._personal_step is not None:
            _assign(self._weights, memory["personal"])
            self._epochs(self._personal_step, self._personal_deferred, *data)
            _assign(memory["personal"], self._weights)
        if self._gradient:
            _assign(self._weights, origin)
            self._full_gradient(images, labels, order[0])
        _assign(self._weights, strategy.begin(origin, memory))
        loss_sum, correct = self._epochs(self._shared_step, self._deferred, *data)
        steps = self._traced_steps(order)
        path = steps * self._local.learning_rate
        kept, extra = strategy.finish(
            self._weights, origin, memory, self._state, path, self._gradient
        )
        _assign(self._extra, extra)
        for name, variables in memory.items():
            if kept[name] is not variables:
                _assign(variables, kept[name])
        return loss_sum, correct

    @functools.cached_property
    def _shared_step(self) -> Step:
        """A compiled step of the weights that are shared."""
        return self._compiled_step(self._deferred, self._corrected)

    @functools.cached_property
    def _personal_step(self) -> Step | None:
        """A compiled step of the weights of a client's own, if the strategy has such."""
        if not self._trains_personal:
            return None
        return self._compiled_step(self._personal_deferred, self._personally_corrected)

    def _corrected(self, gradients: Sequence[Any], known_as: KnownAs = list) -> Sequence[Any]:
        """Return what the shared model steps along: gradients, decayed and corrected.

        Args:
            gradients: one per weight.
            known_as: what the strategy is shown for variables: themselves, or their names.
        """
        weights = known_as(self._weights)
        return self._strategy.correct_gradients(
            self._decayed(gradients, weights),
            weights,
            known_as(self._global_weights),
            {name: known_as(variables) for name, variables in self._memory.items()},
            {name: known_as(variables) for name, variables in self._state.items()},
        )

    def _personally_corrected(
        self, gradients: Sequence[Any], known_as: KnownAs = list
    ) -> Sequence[Any]:
        """Return what the personal model steps along, likewise."""
        weights = known_as(self._weights)
        return self._strategy.correct_personal_gradients(
            self._decayed(gradients, weights), weights, known_as(self._global_weights)
        )

    def _decayed(self, gradients: Sequence[Any], weights: Sequence[Any]) -> Sequence[Any]:
        decay = self._local.weight_decay
        if not decay:
            return gradients
        return [g + decay * w for g, w in zip(gradients, weights, strict=True)]

    def _defer(
        self, correct_gradients: Correct, *, begins_globally: bool, only_update: bool
    ) -> list[Deferred]:
        """Return the kernels whose steps are to be deferred while gradients are corrected so.

        Steps with momentum, in phases, or along what is no sum have to be taken one by one.
        """
        local, found = self._local, list[Deferred]()
        if local.momentum or self._strategy.phases(len(self._weights)):
            return found
        corrections = corrections_of(
            correct_gradients, self._weights, self._global_weights, begins_there=begins_globally
        )
        by_weight = dict(zip(map(id, self._weights), corrections, strict=True))
        for layer in self._layers:
            kernel = getattr(layer, "kernel", None)
            correction = None if kernel is None else by_weight[id(kernel.value)]
            if correction is None:
                continue
            size, rate = local.batch_size, local.learning_rate
            if steps := Deferred.steps(layer, size, drifts=correction.drifts):
                found.append(
                    Deferred(layer, size, steps, rate, correction, only_update=only_update)
                )
        return found

    def _compiled_step(
        self,
        deferred: Sequence[Deferred],
        correct_gradients: Correct,
    ) -> Step:
        """Return `_step_once`, traced in a graph of its own.

        In the graph of the loop, which has a cycle, some processes' oneDNN misses the max-pooling's
        gradient. And TensorFlow never frees graphs that know each other, one of which is traced
        while the other is: a sweep's workers would grow with every run.
        """
        assert tf.executing_eagerly()  # not while another function is traced
        step = tf.function(
            functools.partial(self._step_once, deferred, correct_gradients),
            autograph=False,
            experimental_attributes={"_noinline": True},
        )
        sums = [tf.TensorSpec([], dtype) for dtype in (tf.int32, tf.float32, tf.int32)]
        kept = [each.kept_specs for each in deferred]
        return step.get_concrete_function(*sums, kept, *self._data_specs)  # type: ignore[no-any-return]

    def _epochs(
        self,
        step_once: Step,
        deferred: Sequence[Deferred],
        images: tf.Tensor,
        labels: tf.Tensor,
        order: tf.Tensor,
        dropout_seeds: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Train the model's weights, as they are, on the rows `order` (`[epochs, n]`)."""
        for velocity in self._velocity:
            velocity.assign(tf.zeros_like(velocity))
        begun = [tf.constant(0), tf.constant(0.0), tf.constant(0), [e.begin() for e in deferred]]
        epochs, steps = self._extent(order)
        _, loss_sum, correct, kept = tf.while_loop(
            lambda step, *_: step < epochs * steps,
            lambda *now: step_once(*now, images, labels, order, dropout_seeds),
            begun,
            parallel_iterations=1,
        )
        for each, its in zip(deferred, kept, strict=True):
            each.end(its)
        return loss_sum, correct

    def _step_once(
        self,
        deferred: Sequence[Deferred],
        correct_gradients: Correct,
        step: tf.Tensor,
        loss_sum: tf.Tensor,
        correct: tf.Tensor,
        kept: Sequence[Kept],
        images: tf.Tensor,
        labels: tf.Tensor,
        order: tf.Tensor,
        dropout_seeds: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, list[Kept]]:
        """Take a local step; return the next one, the sums, and what deferred kernels keep."""
        local, (epochs, steps) = self._local, self._extent(order)
        epoch, start = step // steps, step % steps * local.batch_size
        rows = order[epoch, start : start + local.batch_size]
        targets = tf.cast(tf.gather(labels, rows), tf.int32)
        dropouts = Dropouts(dropout_seeds, step)
        losses, logits, gradients, now_kept = self._gradients(
            _pixels(images, rows), targets, dropouts, list(zip(deferred, kept, strict=True))
        )
        later = [gradient is None for gradient in gradients]
        given = [
            tf.zeros_like(w) if is_later else g  # never computed, nor what is made of it
            for g, w, is_later in zip(gradients, self._weights, later, strict=True)
        ]
        steps_along = [
            None if is_later else along
            for along, is_later in zip(correct_gradients(given), later, strict=True)
        ]
        moves = self._moves(step, epochs * steps)
        if moves is not None:
            steps_along = [g * moves[place] for place, g in enumerate(steps_along)]
            for place, velocity in enumerate(self._velocity):
                velocity.assign(velocity * moves[place])  # what keeps still does not coast
        self._step(steps_along)
        in_last_epoch = epoch == epochs - 1
        loss_sum += tf.where(in_last_epoch, tf.reduce_sum(losses), 0.0)
        correct += tf.where(in_last_epoch, _hits(logits, targets), 0)
        return step + 1, loss_sum, correct, now_kept

    def _extent(self, order: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Return the epochs, and the local steps of each."""
        epochs, n = tf.shape(order)[0], tf.shape(order)[1]
        return epochs, (n + self._local.batch_size - 1) // self._local.batch_size

    def _gradients(
        self,
        pixels: tf.Tensor,
        targets: tf.Tensor,
        dropouts: Dropouts | None = None,
        deferred: Sequence[tuple[Deferred, Kept]] = (),
    ) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor | None], list[Kept]]:
        """Return losses, logits and the gradients of the mean loss of a batch.

        The gradients of deferred kernels are None; what these keep is returned last.
        """
        logits, products = forward(self.model, pixels, dropouts, deferred)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits)
        loss = tf.reduce_mean(losses)
        outputs = [output for _, output in products]
        found = tf.gradients(loss, [*self._weights, *outputs])
        gradients, slopes = found[: len(self._weights)], found[len(self._weights) :]
        kept = [
            later.step(x, slope, its)
            for (later, its), (x, _), slope in zip(deferred, products, slopes, strict=True)
        ]
        return losses, logits, gradients, kept

    def _full_gradient(self, images: tf.Tensor, labels: tf.Tensor, rows: tf.Tensor) -> None:
        """Leave the gradient of the mean loss over `rows` (`[n]`), without dropout."""
        n = tf.shape(rows)[0]
        for total in self._gradient:
            total.assign(tf.zeros_like(total))

        def batch_once(start: tf.Tensor) -> Any:
            batch = rows[start : start + _GRADIENT_BATCH]
            targets = tf.cast(tf.gather(labels, batch), tf.int32)
            _, _, gradients, _ = self._gradients(_pixels(images, batch), targets)
            share = tf.cast(tf.shape(batch)[0], tf.float32) / tf.cast(n, tf.float32)
            for total, gradient in zip(self._gradient, gradients, strict=True):
                total.assign_add(share * gradient)
            return (start + _GRADIENT_BATCH,)

        tf.while_loop(lambda start: start < n, batch_once, [tf.constant(0)], parallel_iterations=1)

    def _moves(self, step: tf.Tensor, steps: tf.Tensor) -> tf.Tensor | None:
        """Return what a step's gradients are multiplied by, `[weights]` of 0 and 1, if by any."""
        count = len(self._weights)
        phases = self._strategy.phases(count)
        if not phases:
            return None
        moves = np.ones((len(phases), count), np.float32)
        for place, (_, still) in enumerate(phases):
            moves[place, list(still)] = 0.0
        ends = [tf.cast(tf.round(end * tf.cast(steps, tf.float32)), tf.int32) for end, _ in phases]
        past = tf.cast(step >= tf.stack(ends[:-1]), tf.int32)
        return tf.gather(tf.constant(moves), tf.reduce_sum(past))

    def _traced_steps(self, order: tf.Tensor) -> tf.Tensor:
        """Return `Local.steps` of epochs and examples that are known only when it runs."""
        epochs, batches = self._extent(order)
        steps, m = tf.cast(epochs * batches, tf.float32), self._local.momentum
        return (steps - m * (1 - m**steps) / (1 - m)) / (1 - m) if m else steps

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
            if gradient is not None:
                tf.raw_ops.ResourceApplyGradientDescent(
                    var=weight.handle, alpha=rate, delta=gradient
                )

    def _evaluate_global(
        self, images: tf.Tensor, labels: tf.Tensor, rows: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Evaluate the global weights on `rows` (`[n]`); traced once."""
        _assign(self._weights, self._global_weights)
        return self._evaluate_rows(images, labels, rows)

    def _evaluate_personal(
        self, images: tf.Tensor, labels: tf.Tensor, rows: tf.Tensor, order: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Evaluate the writer's own weights on `rows` after training on `order`; traced once."""
        _assign(self._weights, self._strategy.personal_weights(self._global_weights, self._memory))
        for velocity in self._velocity:
            velocity.assign(tf.zeros_like(velocity))

        def step_once(start: tf.Tensor) -> Any:
            batch = order[start : start + self._local.batch_size]
            targets = tf.cast(tf.gather(labels, batch), tf.int32)
            _, _, gradients, _ = self._gradients(_pixels(images, batch), targets)
            self._step(gradients)
            return (start + self._local.batch_size,)

        tf.while_loop(
            lambda start: start < tf.shape(order)[0],
            step_once,
            [tf.constant(0)],
            parallel_iterations=1,
        )
        return self._evaluate_rows(images, labels, rows)

    def _evaluate_rows(
        self, images: tf.Tensor, labels: tf.Tensor, rows: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Evaluate the model's weights, as they are, on `rows` (`[n]`)."""

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


def forget() -> None:
    """Let go of what Keras and TensorFlow keep of models that are gone, and of their names."""
    gc.collect()
    tf.keras.utils.clear_session(free_memory=False)


def _assign(variables: Sequence[tf.Variable], values: Sequence[Any]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


_READ_ONLY = numba.types.Array(numba.float32, 1, "C", readonly=True)


# With its types, so that it is compiled once, as this is imported, and not in a client's time.
@numba.njit(numba.void(numba.float64[::1], numba.float64, _READ_ONLY, numba.boolean))  # type: ignore[untyped-decorator]
def _add_exactly(total: FloatSum, weight: float, delta: NDArray[np.float32], first: bool) -> None:
    """Add `weight * delta`, rounded to multiples of 2**-30, in one pass over the memory."""
    for i in range(total.size):
        term = weight * np.float64(delta[i]) + GRID - GRID
        total[i] = term if first else total[i] + term


def _magnitude(weight: float, delta: NDArray[np.float32]) -> float:
    """Return a bound of `|weight * delta|`, below LARGEST_SUM, or raise DivergedError."""
    with np.errstate(over="ignore"):
        norm = weight * float(np.sqrt(delta @ delta))  # one pass; the largest takes two
    if norm < 1.0:  # of whatever trains as it should, and not NaN
        return norm
    magnitude = float(weight * max(delta.max(), -delta.min()))  # NaN if one element is
    if not magnitude < LARGEST_SUM:
        raise DivergedError(
            f"the update times its weight of {weight:g} reaches {magnitude:.3g}; "
            f"expected less than {LARGEST_SUM:.0f}"
        )
    return magnitude


def _pixels(images: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
    """Return the images in `rows` as `[n, 28, 28, 1]` float32 in 0..1."""
    return tf.cast(tf.gather(images, rows), tf.float32)[..., tf.newaxis] / 255.0


def _hits(logits: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    predicted = tf.argmax(logits, axis=-1, output_type=tf.int32)
    return tf.reduce_sum(tf.cast(predicted == targets, tf.int32))


def _lend(variables: Sequence[tf.Variable], vector: NDArray[np.float32]) -> None:
    """Have variables hold what lies one after the other in `vector`, there if it can be."""
    parts = unflatten(vector, [tuple(variable.shape) for variable in variables])
    _assign(variables, [_lent(part) for part in parts])


def _lent(array: NDArray[np.float32]) -> Any:
    """Return a tensor of the same memory, where it lies as TensorFlow wants it.

    TensorFlow copies what it does not own before it changes it.
    """
    lendable = array.flags.writeable and array.ctypes.data % 64 == 0
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__()) if lendable else array


def _view(variable: tf.Variable) -> NDArray[np.float32]:
    """Return a variable's values as a flat, read-only view; drop it before the next step."""
    return np.asarray(memoryview(variable.read_value())).reshape(-1)

"""Steps of SGD on a large dense kernel, taken several at a time, also along corrected gradients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from femfed.linear import Linear

_LARGE = 2**20  # weights: smaller kernels live in the cache, where rewriting them costs little
# Weights: smaller kernels stay in some cache, where neither a transposed copy pays nor a second
# product, with a drift, instead of rewriting them.
_HUGE = 2**22
_FEWEST_STEPS, _FEWEST_ROWS = 3, 200  # to keep fewer saves less than it costs
_KEPT = 128  # how much a rewritten kernel costs, in products with what is kept instead
_DEFERRED = "FemfedDeferred"  # name of its gradient


# What a strategy is shown for variables: themselves, or their names.
KnownAs = Callable[[Sequence[tf.Variable]], list[Any]]
# (gradients, KnownAs) -> the gradients that steps are taken along.
Correct = Callable[..., Sequence[Any]]


class Kept(NamedTuple):
    """What a deferred kernel keeps of the steps since it was last rewritten.

    Attributes:
        inputs: of the kernel's layer, `[rows, inputs]`.
        slopes: of the loss along its outputs, times what a step takes of them, `[rows, outputs]`.
        used: how many of the rows.
        shares: what is left of each row's step, `[rows]` float32.
        scale: what is left of the kernel as it was rewritten, float32.
        drifted: how far the kernel went along its drift, float32.
    """

    inputs: tf.Tensor
    slopes: tf.Tensor
    used: tf.Tensor
    shares: tf.Tensor
    scale: tf.Tensor
    drifted: tf.Tensor


@dataclass(frozen=True)
class Correction:
    """The gradient that steps are taken along, of one kernel.

    ```
    g <- gradient * g + weight * w + origin * w_global + sum_j factor_j * array_j
    ```

    Attributes:
        gradient: factor of the loss's own gradient.
        weight: factor of the kernel.
        origin: factor of the global kernel.
        constant: other arrays, which no step changes, and their factors.
        global_kernel: the global kernel.
        begins_there: whether that is where clients begin.
    """

    gradient: float
    weight: float
    origin: float
    constant: tuple[tuple[tf.Variable, float], ...]
    global_kernel: tf.Variable
    begins_there: bool

    @property
    def drifts(self) -> bool:
        """Whether it has a part that no step changes, from the first step on."""
        return bool(self.constant or (self.origin and not self.begins_there))


def corrections_of(
    correct_gradients: Correct,
    weights: Sequence[tf.Variable],
    global_weights: Sequence[tf.Variable],
    *,
    begins_there: bool,
) -> list[Correction | None]:
    """Return how each weight's gradient is corrected, if by a sum of arrays like it.

    None also where another gradient is corrected by it or by its weight, which are not at hand if
    steps are deferred.

    Args:
        correct_gradients: given names for gradients and variables, returns sums of them.
        weights: the model's.
        global_weights: those the round began with.
        begins_there: whether clients begin from the global weights.
    """
    try:
        corrected = correct_gradients(
            [Linear.of(place) for place, _ in enumerate(weights)],
            lambda arrays: [Linear.of(array.ref()) for array in arrays],
        )
        sums = [
            {name: factor for name, factor in its.factors.items() if factor}
            for its, _ in zip(corrected, weights, strict=True)
        ]
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return [None for _ in weights]  # more than plain arithmetic
    changing = [{place, weight.ref()} for place, weight in enumerate(weights)]
    found = list[Correction | None]()
    for place, (weight, origin) in enumerate(zip(weights, global_weights, strict=True)):
        others = [other for other, _ in enumerate(weights) if other != place]
        if any(
            sums[place].keys() & changing[other] or sums[other].keys() & changing[place]
            for other in others
        ):
            found.append(None)
            continue
        factors = dict(sums[place])
        names = place, weight.ref(), origin.ref()
        own, kernel, global_kernel = (factors.pop(name, 0.0) for name in names)
        constant = tuple((name.deref(), factor) for name, factor in factors.items())
        alike = all(array.shape == weight.shape for array, _ in constant)
        correction = Correction(own, kernel, global_kernel, constant, origin, begins_there)
        found.append(correction if alike else None)
    return found


class Deferred:
    """Steps of SGD on a large dense kernel `w`, taken several at a time.

    A step's gradient is the product of two thin matrices, the batch's inputs and slopes:

    ```
    w_t = w_0 + x^T s            x = inputs, s = -rate * gradient * slopes, of the rows since w_0
    b w_t = b w_0 + (b x^T) s    b = the next batch
    ```

    So the inputs and slopes are kept, a few hundred rows, and `w` is rewritten once they are many:
    one long product instead of a thin product and three passes over the memory every step. Products
    read copies of it: in their precision, and, if no cache holds it, transposed for the direction
    that is faster so. Where only the update is wanted and all steps were kept, `x^T s`
    is the update, and `w` is not rewritten at all.

    A gradient that is corrected by a sum (`Correction`, whose factors these are) is no obstacle.
    Where the kernel itself is in the sum, all that was there decays; what no step changes adds up
    to a drift `d`, a second matrix to multiply with:

    ```
    w_t = scale * w_0 + x^T (shares * s) + drifted * d
    scale <- scale - rate * (weight * scale + origin)
    shares <- shares - rate * weight * shares
    drifted <- drifted - rate * (weight * drifted + 1)
    d = sum_j factor_j * array_j
    ```

    That is while `w_0` is the global kernel. Otherwise, and once `w` was rewritten, the global
    kernel is part of the drift, `d + origin * w_global`, and not of `scale`.

    Args:
        layer: the dense layer.
        batch_size: rows that a step adds at most.
        steps: as many batches are kept.
        rate: the learning rate.
        correction: of its gradients.
        only_update: whether nobody asks for the kernel after the last step, but for how far it is
            from the first.
    """

    def __init__(
        self,
        layer: keras.layers.Dense,
        batch_size: int,
        steps: int,
        rate: float,
        correction: Correction,
        *,
        only_update: bool,
    ) -> None:
        self.kernel: tf.Variable = layer.kernel.value
        self._rate, self._batch_size, self._rows = rate, batch_size, steps * batch_size
        self._correction = correction
        self._dtype = tf.as_dtype(layer.compute_dtype)
        self._copy = tf.Variable(tf.cast(self.kernel, self._dtype), trainable=False)
        self._forth, self._back = (self._copy, False), (self._copy, True)  # True: is transposed
        self._transposed = None
        if layer.kernel.shape.num_elements() >= _HUGE:
            # With twenty rows, oneDNN's products in half precision take half the time if the matrix
            # is to be transposed; those in single precision take more.
            self._transposed = tf.Variable(tf.transpose(self._copy), trainable=False)
            if self._dtype == self.kernel.dtype:
                self._back = self._transposed, False
            else:
                self._forth = self._transposed, True
        self._are_first = tf.Variable(False, trainable=False)  # copies of the kernel at `begin`
        self._drift = None
        if correction.drifts or correction.origin:
            self._drift = tf.Variable(tf.zeros_like(self.kernel), trainable=False)
            self._drift_copy = self._drift
            if self._dtype != self.kernel.dtype:
                self._drift_copy = tf.Variable(tf.zeros_like(self._copy), trainable=False)
        self._decays = bool(correction.weight or correction.origin)
        self._is_corrected = self._decays or self._drift is not None
        self._update = None
        only_rows = not correction.drifts and correction.weight + correction.origin == 0
        if only_update and only_rows:
            self._update = tf.Variable(tf.zeros_like(self._copy), trainable=False)

    @staticmethod
    def steps(layer: keras.layers.Layer, batch_size: int, *, drifts: bool = False) -> int:
        """Return how many steps to defer for the least work, 0 for none.

        With every step kept, the products with what is kept grow; with every step taken, the kernel
        is rewritten. The constants are measured; they decide about speed only.

        Args:
            layer: any layer.
            batch_size: rows that a step adds at most.
            drifts: whether each product takes a second one, with the drift.
        """
        if not isinstance(layer, keras.layers.Dense):
            return 0
        inputs, outputs = layer.kernel.shape
        if inputs * outputs < (_HUGE if drifts else _LARGE):
            return 0
        rows = int((_KEPT * inputs * outputs / (inputs + outputs)) ** 0.5)
        steps = rows // batch_size
        return steps if rows >= _FEWEST_ROWS and steps >= _FEWEST_STEPS else 0

    @property
    def kept_specs(self) -> Kept:
        """What is kept: shapes and types."""
        inputs, outputs = self.kernel.shape
        return Kept(
            tf.TensorSpec([self._rows, inputs], self._dtype),
            tf.TensorSpec([self._rows, outputs], self._dtype),
            tf.TensorSpec([], tf.int32),
            tf.TensorSpec([self._rows], tf.float32),
            tf.TensorSpec([], tf.float32),
            tf.TensorSpec([], tf.float32),
        )

    def forget(self) -> None:
        """Take note that the global kernel is another one than the last client's."""
        self._are_first.assign(False)

    def begin(self) -> Kept:
        """Start from the kernel as it is; no step is kept."""
        if self._correction.begins_there:
            tf.cond(self._are_first, lambda: True, lambda: self._make_copies(first=True))
        else:
            self._make_copies(first=True)
        if self._correction.drifts:
            self._make_drift(first=True)
        inputs, slopes = (
            tf.raw_ops.Empty(shape=[self._rows, width], dtype=self._dtype)
            for width in self.kernel.shape
        )
        return Kept(inputs, slopes, *self._none_kept())

    def product(self, x: tf.Tensor, kept: Kept) -> tf.Tensor:
        """Return `x` times the kernel with all its steps taken."""
        used = kept.used
        inputs, slopes = kept.inputs[:used], kept.slopes[:used]
        motion = [kept.shares[:used], kept.scale] if self._is_corrected else []
        if self._drift is not None:
            drifts = tf.constant(True) if self._correction.drifts else ~self._are_first.read_value()
            motion += [kept.drifted, drifts, self._drift_copy]
        forth, transposed = self._forth
        product = _through(x, forth, transposed, inputs, slopes, motion)
        back, transposed = self._back
        its = [product, x, back, tf.constant(transposed), inputs, slopes, *motion]
        graph = tf.compat.v1.get_default_graph()
        with graph.gradient_override_map({"IdentityN": _DEFERRED}):
            return tf.raw_ops.IdentityN(input=its)[0]

    def step(self, x: tf.Tensor, slope: tf.Tensor, kept: Kept) -> Kept:
        """Keep the step along `x^T slope`."""
        rate, correction = self._rate, self._correction
        after = kept.used + tf.shape(x)[0]
        rows = tf.range(kept.used, after)
        scaled = tf.cast(-rate * correction.gradient * tf.cast(slope, tf.float32), slope.dtype)
        # Variables would be copied at every change, as long as somebody reads another row.
        inputs = tf.raw_ops.InplaceUpdate(x=kept.inputs, i=rows, v=x)
        slopes = tf.raw_ops.InplaceUpdate(x=kept.slopes, i=rows, v=scaled)
        shares, scale, drifted = kept.shares, kept.scale, kept.drifted
        if self._is_corrected:
            old = tf.range(self._rows) < kept.used
            shares = tf.where(old, (1 - rate * correction.weight) * shares, 1.0)
            at_origin = tf.cast(self._are_first, tf.float32) if correction.begins_there else 0.0
            scale -= rate * (correction.weight * scale + correction.origin * at_origin)
            drifted -= rate * (correction.weight * drifted + 1)
        kept = Kept(inputs, slopes, after, shares, scale, drifted)
        full = after > self._rows - self._batch_size
        return Kept(inputs, slopes, *tf.cond(full, lambda: self.take(kept), lambda: kept[2:]))

    def take(self, kept: Kept) -> tuple[tf.Tensor, ...]:
        """Take the steps that are kept and return what is kept besides rows, if there are none."""
        self._rewrite(kept)
        self._make_copies(first=False)
        self._make_drift(first=False)
        return self._none_kept()

    def end(self, kept: Kept) -> None:
        """Take the steps that are kept, the last ones: `update` is there, or the kernel."""
        update = self._update
        if update is None:
            self._rewrite(kept)
            return

        def leave_update() -> bool:
            update.assign(self._moved(kept))
            return True

        tf.cond(self._are_first, leave_update, lambda: self._rewrite(kept))

    @property
    def update(self) -> tf.Variable | None:
        """The last kernel less the first; None if the kernel itself was rewritten."""
        return self._update if self._are_first else None

    def _none_kept(self) -> tuple[tf.Tensor, ...]:
        return tf.constant(0), tf.ones([self._rows]), tf.constant(1.0), tf.constant(0.0)

    def _moved(self, kept: Kept) -> tf.Tensor:
        """Return how far a kernel is moved by the rows that are kept."""
        inputs, slopes = kept.inputs[: kept.used], kept.slopes[: kept.used]
        if self._decays:
            slopes = _scaled(slopes, kept.shares[: kept.used, tf.newaxis])
        return tf.matmul(inputs, slopes, transpose_a=True)

    def _rewrite(self, kept: Kept) -> bool:
        """Move the kernel; return something, as a branch has to."""
        kernel = self.kernel.read_value()
        moved = tf.cast(self._moved(kept), kernel.dtype)
        if self._decays:
            kernel *= kept.scale
        # Not in place: a client's kernel begins as the global one, which would be copied first.
        self.kernel.assign(kernel + moved)

        def along_drift() -> bool:
            tf.raw_ops.ResourceApplyGradientDescent(
                var=self.kernel.handle, alpha=-kept.drifted, delta=self._drift
            )
            return True

        if self._correction.drifts:
            along_drift()
        elif self._drift is not None:
            tf.cond(self._are_first, lambda: True, along_drift)
        return True

    def _make_copies(self, *, first: bool) -> bool:
        """Copy the kernel as it is; return something, too."""
        self._copy.assign(tf.cast(self.kernel, self._dtype))
        if self._transposed is not None:
            self._transposed.assign(tf.transpose(self._copy))
        self._are_first.assign(first)
        return True

    def _make_drift(self, *, first: bool) -> None:
        """Add up what no step changes, for the kernel as it was just copied."""
        if self._drift is None:
            return
        correction = self._correction
        terms = list(correction.constant)
        if correction.origin and not (first and correction.begins_there):
            terms.append((correction.global_kernel, correction.origin))
        self._drift.assign(_sum(terms))
        if self._drift_copy is not self._drift:
            self._drift_copy.assign(tf.cast(self._drift, self._dtype))


@tf.RegisterGradient(_DEFERRED)  # type: ignore[untyped-decorator]
def _deferred_gradients(its: tf.Operation, slopes: tf.Tensor, *_: None) -> list[tf.Tensor | None]:
    _, _, back, transposed, kept_inputs, kept_slopes, *motion = its.inputs
    transposed = bool(tf.get_static_value(transposed))
    along_x = _through(slopes, back, transposed, kept_slopes, kept_inputs, motion, back=True)
    return [None, along_x, *[None for _ in its.inputs[2:]]]


def _through(
    x: tf.Tensor,
    kernel: tf.Tensor,
    transposed: bool,
    first: tf.Tensor,
    second: tf.Tensor,
    motion: Sequence[tf.Tensor],
    *,
    back: bool = False,
) -> tf.Tensor:
    """Return `x` times `scale * kernel + first^T (shares * second) + drifted * drift`."""
    product, along = times(x, kernel, transposed=transposed), times(x, first, transposed=True)
    if motion:
        shares, scale, *motion = motion
        product, along = _scaled(product, scale), _scaled(along, shares)
    product += times(along, second)
    if motion:
        drifted, drifts, drift = motion

        def with_drift() -> tf.Tensor:
            return product + _scaled(times(x, drift, transposed=back), drifted)

        if tf.get_static_value(drifts):
            return with_drift()
        return tf.cond(drifts, with_drift, lambda: product)
    return product


def _scaled(x: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Return `x` times float32 numbers, rounded once."""
    return tf.cast(tf.cast(x, tf.float32) * factor, x.dtype)


def _sum(terms: Sequence[tuple[tf.Variable, float]]) -> tf.Tensor:
    """Return the sum of arrays, each times its factor, with as few passes as it takes."""
    (array, factor), *others = sorted(terms, key=lambda term: -term[1])
    total = array.read_value() if factor == 1 else factor * array
    for array, factor in others:
        if factor == -1:
            total -= array
        else:
            total += array if factor == 1 else factor * array
    return total


def times(x: tf.Tensor, matrix: tf.Tensor, *, transposed: bool = False) -> tf.Tensor:
    """Return `x` times `matrix`, or its transpose: that as a batched product, which is faster."""
    if not transposed:
        return tf.matmul(x, matrix)
    return tf.squeeze(
        tf.matmul(tf.expand_dims(x, 0), tf.expand_dims(matrix, 0), transpose_b=True), 0
    )

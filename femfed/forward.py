"""The model's forward pass of a local step: Keras' layers, or what computes the same sooner.

Four things differ from calling the model, none of them the mathematics:

- A dense layer's gradient towards its input is a batched product, which oneDNN serves by kernels
  that take the transposed weights as they lie: 1.7 times as fast with twenty rows.
- Dropout compares eight or sixteen random bits with its rate, not a uniform number of thirty-two.
- A large dense kernel is not rewritten at every step of plain SGD (`Deferred`).
- In half precision a convolution's ReLU follows its max-pooling, where a quarter is left to do: the
  largest of what is rectified is the largest, rectified.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import keras
import tensorflow as tf

_LARGE = 2**20  # weights: smaller kernels live in the cache, where rewriting them costs little
_HUGE = 2**22  # weights: smaller kernels stay in some cache between a step's products
Kept = tuple[tf.Tensor, tf.Tensor, tf.Tensor]  # inputs, slopes, how many of their rows are used
_KEPT = 128  # how much a rewritten kernel costs, in products with what is kept instead
_PRODUCT, _DEFERRED = "FemfedProduct", "FemfedDeferred"  # names of gradients
_PHILOX = 1  # TensorFlow's number of the generator


class Deferred:
    """Steps of plain SGD on a large dense kernel `w`, taken several at a time.

    A step's gradient is the product of two thin matrices, the batch's inputs and slopes:

    ```
    w_t = w_0 + x^T s            x = inputs, s = -rate * slopes, of the rows seen since w_0
    b w_t = b w_0 + (b x^T) s    b = the next batch
    ```

    So the inputs and slopes are kept, a few hundred rows, and `w` is rewritten once they are many:
    one long product instead of a thin product and three passes over the memory every step. Products
    read copies of it: in their precision, and, of one that no cache holds, transposed for the way
    in which it is read sooner so. Where only the update is wanted and all steps were kept, `x^T s`
    is the update, and `w` is not rewritten at all.

    Args:
        layer: the dense layer.
        batch_size: rows that a step adds at most.
        steps: as many batches are kept.
        rate: the learning rate.
        only_update: whether nobody asks for the kernel after the last step, but for how far it is
            from the first.
    """

    def __init__(
        self,
        layer: keras.layers.Dense,
        batch_size: int,
        steps: int,
        rate: float,
        *,
        only_update: bool,
    ) -> None:
        self.kernel: tf.Variable = layer.kernel.value
        self._rate, self._batch_size, self._rows = rate, batch_size, steps * batch_size
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
        self._update = None
        if only_update:
            self._update = tf.Variable(tf.zeros_like(self._copy), trainable=False)

    @staticmethod
    def steps(layer: keras.layers.Layer, batch_size: int) -> int:
        """Return how many steps to defer for the least work; less than 3 is none.

        With every step kept, the products with what is kept grow; with every step taken, the kernel
        is rewritten. The constant is measured; it decides about speed only.
        """
        if not isinstance(layer, keras.layers.Dense) or layer.kernel.shape.num_elements() < _LARGE:
            return 0
        inputs, outputs = layer.kernel.shape
        return int((_KEPT * inputs * outputs / (inputs + outputs)) ** 0.5) // batch_size

    @property
    def kept_specs(self) -> tuple[tf.TensorSpec, tf.TensorSpec, tf.TensorSpec]:
        """What is kept: shapes and types."""
        inputs, outputs = self.kernel.shape
        return (
            tf.TensorSpec([self._rows, inputs], self._dtype),
            tf.TensorSpec([self._rows, outputs], self._dtype),
            tf.TensorSpec([], tf.int32),
        )

    def forget(self) -> None:
        """Take note that the next client starts from another kernel than the last one did."""
        self._are_first.assign(False)

    def begin(self) -> Kept:
        """Start from the kernel as it is; no step is kept."""
        tf.cond(self._are_first, lambda: True, lambda: self._make_copies(first=True))
        inputs, slopes = (
            tf.raw_ops.Empty(shape=[self._rows, width], dtype=self._dtype)
            for width in self.kernel.shape
        )
        return inputs, slopes, tf.constant(0)

    def product(self, x: tf.Tensor, kept: Kept) -> tf.Tensor:
        """Return `x` times the kernel with all its steps taken."""
        inputs, slopes, used = kept
        moved = _times(_times(x, inputs[:used], transposed=True), slopes[:used])
        product = _times(x, self._forth[0], transposed=self._forth[1]) + moved
        back, transposed = self._back
        graph = tf.compat.v1.get_default_graph()
        with graph.gradient_override_map({"IdentityN": _DEFERRED}):
            its = [product, x, back, tf.constant(transposed), inputs[:used], slopes[:used]]
            return tf.raw_ops.IdentityN(input=its)[0]

    def step(self, x: tf.Tensor, slope: tf.Tensor, kept: Kept) -> Kept:
        """Keep the step along `x^T slope`."""
        inputs, slopes, used = kept
        after = used + tf.shape(x)[0]
        rows = tf.range(used, after)
        scaled = tf.cast(-self._rate * tf.cast(slope, tf.float32), slope.dtype)
        # Variables would be copied at every change, as long as somebody reads another row.
        inputs = tf.raw_ops.InplaceUpdate(x=inputs, i=rows, v=x)
        slopes = tf.raw_ops.InplaceUpdate(x=slopes, i=rows, v=scaled)
        kept = inputs, slopes, after
        full = after > self._rows - self._batch_size
        return inputs, slopes, tf.cond(full, lambda: self.take(kept), lambda: after)

    def take(self, kept: Kept) -> tf.Tensor:
        """Take the steps that are kept and return how many rows are: none."""
        self._rewrite(kept)
        self._make_copies(first=False)
        return tf.constant(0)

    def end(self, kept: Kept) -> None:
        """Take the steps that are kept, the last ones: `update` is there, or the kernel."""
        update = self._update
        if update is None:
            self._rewrite(kept)
            return

        def leave_update() -> bool:
            update.assign(_outer(kept))
            return True

        tf.cond(self._are_first, leave_update, lambda: self._rewrite(kept))

    @property
    def update(self) -> tf.Variable | None:
        """The last kernel less the first; None if the kernel itself was rewritten."""
        return self._update if self._are_first else None

    def _rewrite(self, kept: Kept) -> bool:
        """Move the kernel; return something, as a branch has to."""
        # Not in place: a client's kernel begins as the global one, which would be copied first.
        self.kernel.assign(self.kernel + tf.cast(_outer(kept), self.kernel.dtype))
        return True

    def _make_copies(self, *, first: bool) -> bool:
        """Copy the kernel as it is; return something, too."""
        self._copy.assign(tf.cast(self.kernel, self._dtype))
        if self._transposed is not None:
            self._transposed.assign(tf.transpose(self._copy))
        self._are_first.assign(first)
        return True


@dataclass(frozen=True)
class Dropouts:
    """What dropout is drawn from.

    Attributes:
        seeds: one per layer that drops, `[layers]` int32.
        step: the local step.
    """

    seeds: tf.Tensor
    step: tf.Tensor

    def drop(self, x: tf.Tensor, place: int, rate: float) -> tf.Tensor:
        """Set a share `rate` of `x` to zero and scale up the rest.

        Args:
            x: activations.
            place: which of the layers that drop.
            rate: known to a multiple of 2**-16.
        """
        size = tf.size(x)
        width = tf.uint8 if (rate * 2**8).is_integer() else tf.uint16  # random bits are dear
        drawn = tf.raw_ops.StatelessRandomUniformFullIntV2(
            shape=[(size * width.size + 7) // 8],
            key=tf.cast(self.seeds[place : place + 1], tf.uint64),
            counter=tf.cast(tf.stack([0, self.step]), tf.uint64),
            alg=_PHILOX,
            dtype=tf.uint64,
        )
        bits = tf.reshape(tf.reshape(tf.bitcast(drawn, width), [-1])[:size], tf.shape(x))
        values = 2 ** (8 * width.size)
        threshold = tf.constant(min(round(rate * values), values - 1), width)
        kept = tf.cast(bits >= threshold, x.dtype)
        return x * (kept * (1 / (1 - rate)))


def drops(layer: keras.layers.Layer) -> bool:
    """Whether a layer draws random numbers in training."""
    return isinstance(layer, keras.layers.Dropout) and layer.rate > 0


def forward(
    model: keras.Sequential,
    pixels: tf.Tensor,
    dropouts: Dropouts | None,
    deferred: Sequence[tuple[Deferred, Kept]],
) -> tuple[tf.Tensor, list[tuple[tf.Tensor, tf.Tensor]]]:
    """Return the logits, and inputs and outputs of the product of each deferred kernel.

    Args:
        model: whose layers.
        pixels: `[n, 28, 28, 1]` in 0..1.
        dropouts: None drops nothing.
        deferred: kernels whose steps are deferred, in the order of the layers, and what they keep.
    """
    x, place, layers = pixels, 0, model.layers
    by_kernel = {id(each.kernel): (each, kept) for each, kept in deferred}
    products = []
    for last, layer, following in zip([None, *layers], layers, [*layers[1:], None], strict=False):
        if isinstance(layer, keras.layers.Dense):
            x = tf.cast(x, layer.compute_dtype)
            if id(layer.kernel.value) in by_kernel:
                later, kept = by_kernel[id(layer.kernel.value)]
                products.append((x, x := later.product(x, kept)))
            else:
                x = _product(x, tf.cast(layer.kernel.value, x.dtype))
            x = layer.activation(x + tf.cast(layer.bias.value, x.dtype))
        elif _rectifies_late(layer, following):
            x = tf.cast(x, layer.compute_dtype)
            x = layer.convolution_op(x, tf.cast(layer.kernel.value, x.dtype))
            x = tf.nn.bias_add(x, tf.cast(layer.bias.value, x.dtype))
        elif _rectifies_late(last, layer):
            x = tf.nn.relu(layer(x))
        elif not isinstance(layer, keras.layers.Dropout):
            x = layer(x)
        elif dropouts is not None and drops(layer):
            x, place = dropouts.drop(x, place, layer.rate), place + 1
    return x, products


def _rectifies_late(layer: keras.layers.Layer | None, following: keras.layers.Layer | None) -> bool:
    """Whether a convolution's ReLU is to follow the max-pooling that follows it."""
    return (
        isinstance(layer, keras.layers.Conv2D)
        and isinstance(following, keras.layers.MaxPooling2D)
        and layer.activation is keras.activations.relu
        and layer.compute_dtype != "float32"
    )


def _product(x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    graph = tf.compat.v1.get_default_graph()
    with graph.gradient_override_map({"MatMul": _PRODUCT}):
        return tf.matmul(x, kernel)


# By name: `tf.custom_gradient` keeps every graph it was ever part of.
@tf.RegisterGradient(_PRODUCT)  # type: ignore[untyped-decorator]
def _product_gradients(product: tf.Operation, slopes: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    x, kernel = product.inputs
    return _times(slopes, kernel, transposed=True), tf.matmul(x, slopes, transpose_a=True)


@tf.RegisterGradient(_DEFERRED)  # type: ignore[untyped-decorator]
def _deferred_gradients(its: tf.Operation, slopes: tf.Tensor, *_: None) -> list[tf.Tensor | None]:
    _, _, back, transposed, kept_inputs, kept_slopes = its.inputs
    moved = _times(_times(slopes, kept_slopes, transposed=True), kept_inputs)
    along_x = _times(slopes, back, transposed=bool(tf.get_static_value(transposed))) + moved
    return [None, along_x, None, None, None, None]


def _outer(kept: Kept) -> tf.Tensor:
    """Return how far a kernel is moved by what is kept."""
    inputs, slopes, used = kept
    return tf.matmul(inputs[:used], slopes[:used], transpose_a=True)


def _times(x: tf.Tensor, matrix: tf.Tensor, *, transposed: bool = False) -> tf.Tensor:
    """Return `x` times `matrix`, or its transpose: that as a batched product, which is faster."""
    if not transposed:
        return tf.matmul(x, matrix)
    return tf.squeeze(
        tf.matmul(tf.expand_dims(x, 0), tf.expand_dims(matrix, 0), transpose_b=True), 0
    )

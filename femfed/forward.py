"""The model's forward pass of a local step: Keras' layers, or what computes the same sooner.

Three things differ from calling the model, none of them the mathematics:

- A dense layer's gradient towards its input is a batched product, which oneDNN serves by kernels
  that take the transposed weights as they lie: 1.7 times as fast with twenty rows.
- Dropout compares eight or sixteen random bits with its rate, not a uniform number of thirty-two.
- A large dense kernel is not rewritten at every step of plain SGD (`Deferred`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import keras
import tensorflow as tf

_LARGE = 2**20  # weights: smaller kernels live in the cache, where rewriting them costs little
Kept = tuple[tf.Tensor, tf.Tensor, tf.Tensor]  # inputs, slopes, how many of their rows are used
_PRODUCT = "FemfedProduct"  # name of a gradient
_PHILOX = 1  # TensorFlow's number of the generator


class Deferred:
    """Steps of plain SGD on a large dense kernel `w`, taken several at a time.

    A step's gradient is the product of two thin matrices, the batch's inputs and slopes:

    ```
    w_t = w_0 - rate * x^T s            x = inputs, s = slopes of the rows seen since w_0
    b w_t = b w_0 - rate * (b x^T) s    b = the next batch
    ```

    So the inputs and slopes are kept, a few hundred rows, and `w` is rewritten once they are many:
    one long product instead of a thin product and three passes over the memory every step.

    Args:
        layer: the dense layer.
        batch_size: rows that a step adds at most.
        steps: as many batches are kept.
        rate: the learning rate.
    """

    def __init__(self, layer: keras.layers.Dense, batch_size: int, steps: int, rate: float) -> None:
        self.kernel: tf.Variable = layer.kernel.value
        self._rate, self._batch_size, self._rows = rate, batch_size, steps * batch_size
        self._dtype = tf.as_dtype(layer.compute_dtype)
        self._cast = None  # the kernel in half precision, cast only where it is rewritten
        if self._dtype != self.kernel.dtype:
            self._cast = tf.Variable(tf.cast(self.kernel, self._dtype), trainable=False)

    @staticmethod
    def steps(layer: keras.layers.Layer, batch_size: int) -> int:
        """Return how many steps to defer for the least work; less than 2 is none.

        With every step kept, the products with what is kept grow; with every step taken, the kernel
        is rewritten. The constant is measured; it decides about speed only.
        """
        if not isinstance(layer, keras.layers.Dense) or layer.kernel.shape.num_elements() < _LARGE:
            return 0
        inputs, outputs = layer.kernel.shape
        return int((32 * inputs * outputs / (inputs + outputs)) ** 0.5) // batch_size

    @property
    def kept_specs(self) -> tuple[tf.TensorSpec, tf.TensorSpec, tf.TensorSpec]:
        """What is kept: shapes and types."""
        inputs, outputs = self.kernel.shape
        return (
            tf.TensorSpec([self._rows, inputs], self._dtype),
            tf.TensorSpec([self._rows, outputs], self._dtype),
            tf.TensorSpec([], tf.int32),
        )

    def begin(self) -> Kept:
        """Take the kernel as it is; no step is kept."""
        if self._cast is not None:
            self._cast.assign(tf.cast(self.kernel, self._dtype))
        inputs, slopes = (
            tf.raw_ops.Empty(shape=[self._rows, width], dtype=self._dtype)
            for width in self.kernel.shape
        )
        return inputs, slopes, tf.constant(0)

    def product(self, x: tf.Tensor, kept: Kept) -> tf.Tensor:
        """Return `x` times the kernel with all its steps taken."""
        kernel = tf.stop_gradient(self.kernel if self._cast is None else self._cast)
        inputs, slopes, used = kept
        overlap = tf.matmul(
            tf.expand_dims(x, 0), tf.expand_dims(inputs[:used], 0), transpose_b=True
        )
        moved = tf.matmul(self._rate * overlap, tf.expand_dims(slopes[:used], 0))
        return _product(x, kernel) - tf.squeeze(moved, 0)

    def step(self, x: tf.Tensor, slope: tf.Tensor, kept: Kept) -> Kept:
        """Keep the step along `x^T slope`."""
        inputs, slopes, used = kept
        after = used + tf.shape(x)[0]
        rows = tf.range(used, after)
        # Variables would be copied at every change, as long as somebody reads another row.
        inputs = tf.raw_ops.InplaceUpdate(x=inputs, i=rows, v=x)
        slopes = tf.raw_ops.InplaceUpdate(x=slopes, i=rows, v=slope)
        kept = inputs, slopes, after
        full = after > self._rows - self._batch_size
        return inputs, slopes, tf.cond(full, lambda: self.take(kept), lambda: after)

    def take(self, kept: Kept, *, last: bool = False) -> tf.Tensor:
        """Take the steps that are kept and return how many rows are: none.

        Args:
            kept: inputs and slopes.
            last: whether no product follows.
        """
        inputs, slopes, used = kept

        def rewrite() -> tf.Tensor:
            gradient = tf.matmul(inputs[:used], slopes[:used], transpose_a=True)
            apply_gradient(self.kernel, self._rate, gradient)
            if self._cast is not None and not last:
                self._cast.assign(tf.cast(self.kernel, self._dtype))
            return tf.constant(0)

        return tf.cond(used > 0, rewrite, lambda: tf.constant(0))


def apply_gradient(weight: tf.Variable, rate: float, gradient: tf.Tensor) -> None:
    """Take a step of SGD with the fused kernel, which is faster than `assign_sub`."""
    tf.raw_ops.ResourceApplyGradientDescent(
        var=weight.handle, alpha=rate, delta=tf.cast(gradient, weight.dtype)
    )


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
    x, place = pixels, 0
    by_kernel = {id(each.kernel): (each, kept) for each, kept in deferred}
    products = []
    for layer in model.layers:
        if isinstance(layer, keras.layers.Dense):
            x = tf.cast(x, layer.compute_dtype)
            if id(layer.kernel.value) in by_kernel:
                later, kept = by_kernel[id(layer.kernel.value)]
                products.append((x, x := later.product(x, kept)))
            else:
                x = _product(x, tf.cast(layer.kernel.value, x.dtype))
            x = layer.activation(x + tf.cast(layer.bias.value, x.dtype))
        elif not isinstance(layer, keras.layers.Dropout):
            x = layer(x)
        elif dropouts is not None and drops(layer):
            x, place = dropouts.drop(x, place, layer.rate), place + 1
    return x, products


def _product(x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    graph = tf.compat.v1.get_default_graph()
    with graph.gradient_override_map({"MatMul": _PRODUCT}):
        return tf.matmul(x, kernel)


# By name: `tf.custom_gradient` keeps every graph it was ever part of.
@tf.RegisterGradient(_PRODUCT)  # type: ignore[untyped-decorator]
def _product_gradients(product: tf.Operation, slopes: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    x, kernel = product.inputs
    along_x = tf.matmul(tf.expand_dims(slopes, 0), tf.expand_dims(kernel, 0), transpose_b=True)
    return tf.squeeze(along_x, 0), tf.matmul(x, slopes, transpose_a=True)

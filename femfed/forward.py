"""The model's forward pass of a local step: Keras' layers, or what computes the same sooner.

Five things differ from calling the model, none of them the mathematics:

- A dense layer's gradient towards its input is a batched product, which oneDNN serves by kernels
  that take the transposed weights as they lie: 1.7 times as fast with twenty rows.
- Dropout compares eight or sixteen random bits with its rate, not a uniform number of thirty-two.
- A large dense kernel is not rewritten at every step of SGD (`Deferred`).
- A convolution's bias and ReLU follow its max-pooling, where a quarter is left to do: the largest
  of what is shifted and rectified is the largest, shifted and rectified.
- A convolution's bias has a gradient of its own: oneDNN's product that leaves it with the kernel's
  takes longer than both.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import keras
import tensorflow as tf

from femfed.deferred import Deferred, Kept, times
from femfed.models import layers_of

_PRODUCT, _BIAS = "FemfedProduct", "FemfedBias"  # names of gradients
_PHILOX = 1  # TensorFlow's number of the generator


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
    x, place, layers = pixels, 0, layers_of(model)
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
            if layer.bias is not None:
                x += tf.cast(layer.bias.value, x.dtype)
            x = layer.activation(x)
        elif _is_pooled(layer, following):
            x = tf.cast(x, layer.compute_dtype)
            x = layer.convolution_op(x, tf.cast(layer.kernel.value, x.dtype))
        elif _is_pooled(last, layer):
            with _biases_by_themselves():
                x = tf.nn.bias_add(layer(x), tf.cast(last.bias.value, layer.compute_dtype))
            x = last.activation(x)
        elif isinstance(layer, keras.layers.Conv2D):
            with _biases_by_themselves():
                x = layer(x)
        elif not isinstance(layer, keras.layers.Dropout):
            x = layer(x)
        elif dropouts is not None and drops(layer):
            x, place = dropouts.drop(x, place, layer.rate), place + 1
    return x, products


def _is_pooled(layer: keras.layers.Layer | None, following: keras.layers.Layer | None) -> bool:
    """Whether a convolution's bias and ReLU are to follow the max-pooling that follows it."""
    return (
        isinstance(layer, keras.layers.Conv2D)
        and layer.bias is not None
        and isinstance(following, keras.layers.MaxPooling2D)
        and layer.activation is keras.activations.relu
    )


def _product(x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    graph = tf.compat.v1.get_default_graph()
    with graph.gradient_override_map({"MatMul": _PRODUCT}):
        return tf.matmul(x, kernel)


# By name: `tf.custom_gradient` keeps every graph it was ever part of.
@tf.RegisterGradient(_PRODUCT)  # type: ignore[untyped-decorator]
def _product_gradients(product: tf.Operation, slopes: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    x, kernel = product.inputs
    return times(slopes, kernel, transposed=True), tf.matmul(x, slopes, transpose_a=True)


def _biases_by_themselves() -> AbstractContextManager[None]:
    """Have biases that are added in the block get a gradient of their own."""
    graph = tf.compat.v1.get_default_graph()
    return graph.gradient_override_map({"BiasAdd": _BIAS})  # type: ignore[no-any-return]


@tf.RegisterGradient(_BIAS)  # type: ignore[untyped-decorator]
def _bias_gradients(_: tf.Operation, slopes: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    # `BiasAddGrad` would add up thousands of bfloat16 numbers in bfloat16, this does in float32.
    return slopes, tf.reduce_sum(slopes, range(slopes.shape.rank - 1))

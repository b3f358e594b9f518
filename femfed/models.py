"""The models of the FEMNIST literature: frozen specs with `.build(seed) -> "keras.Sequential"`.

Every model takes `[n, 28, 28, 1]` float32 pixels in 0..1 (white background 1.0, as FEMNIST is
published) and returns 62 logits. Initial weights are seeded layer by layer from the run's seed,
dropout anew for every client (`client.py`); Keras' global generator is never drawn from.

A model of your own is one more frozen dataclass, chosen by `model._target_`. Clients train it by
the forward pass of `forward.py`, so `build_checked` refuses a layer that this would train
differently from Keras.

`invert` makes the first layer `1 - x`: ink 1, background 0. The published experiments train on the
pixels as they are, which works, but starts slowly: most inputs are 1.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from femfed import UserError, printable
from femfed.seeds import generator

if TYPE_CHECKING:  # Keras takes seconds to import: only who builds a model waits for it
    import keras

CLASSES = 62
IMAGE = (28, 28, 1)
CPU = Path("/proc/cpuinfo")
LAYERS = (  # of keras.layers: deterministic, without state but their weights, but for Dropout
    *("Activation", "AveragePooling2D", "Conv2D", "Conv2DTranspose", "Cropping2D", "Dense"),
    *("DepthwiseConv2D", "Dropout", "ELU", "Flatten", "GlobalAveragePooling2D"),
    *("GlobalMaxPooling2D", "GroupNormalization", "Identity", "LayerNormalization", "LeakyReLU"),
    *("MaxPooling2D", "PReLU", "Permute", "ReLU", "Rescaling", "Reshape", "SeparableConv2D"),
    *("Softmax", "UnitNormalization", "UpSampling2D", "ZeroPadding2D"),
)


class Model(Protocol):
    """What `conf/model/NAME.yaml` builds."""

    @property
    def parameters(self) -> int:
        """Number of weights."""

    def build(self, seed: int, precision: str = "float32") -> "keras.Sequential":
        """Return a fresh model whose initial weights, always float32, depend on `seed` alone.

        Args:
            seed: of the run.
            precision: `bfloat16` computes activations and products in it, all but the logits'.
        """


def check_precision(model: Model, precision: str, cpu: Path = CPU) -> None:
    """Refuse a precision that would not make a client's training any faster.

    Args:
        model: what is to be trained.
        precision: `float32` or `bfloat16`.
        cpu: what the kernel says of the processor.

    Raises:
        UserError: the processor has no bfloat16 products, or the model nothing that gains by them.
    """
    if precision == "float32":
        return
    if isinstance(model, Dense):
        raise UserError(
            f"precision={precision} with a model of dense layers only, which is no faster for it; "
            "expected a model with convolutions; leave precision=float32"
        )
    flags = set(cpu.read_text().split()) if cpu.exists() else set()
    if not flags & {"avx512_bf16", "amx_bf16"}:
        raise UserError(
            f"precision={precision} on a CPU without bfloat16 products, where it is slower; "
            f"expected avx512_bf16 or amx_bf16 among the flags in {cpu}; leave precision=float32"
        )


def check_model(model: Model, seed: int, precision: str) -> None:
    """Refuse a model that clients would train differently from Keras, or each with other weights.

    The models of this module are known to be right, and Keras takes seconds to import.

    Args:
        model: what is to be trained.
        seed: of the run.
        precision: `float32` or `bfloat16`.

    Raises:
        UserError: the model, the layer and the reason.
    """
    if type(model) in (CNN, PooledCNN, Dense):
        return
    first, second = (build_checked(model, seed, precision) for _ in range(2))
    for layer, again in zip(layers_of(first), layers_of(second), strict=True):
        pairs = zip(layer.get_weights(), again.get_weights(), strict=True)
        if not all((one == other).all() for one, other in pairs):
            raise UserError(
                f"model {type(model).__name__}: layer {printable(layer.name)} begins with other "
                f"weights at each build(seed={seed}); accepted: weights that depend on the seed "
                "alone; give its initializers a seed"
            )
    import keras

    keras.utils.clear_session(free_memory=False)  # a layer that is built later keeps its name


def check_weights(model: Model, weights: Sequence[NDArray[np.float32]]) -> None:
    """Refuse to go on with a model that another number of weights belongs to.

    Args:
        model: what is to be trained.
        weights: of the checkpoint.

    Raises:
        UserError: both numbers.
    """
    if (saved := sum(array.size for array in weights)) != model.parameters:
        raise UserError(
            f"model {type(model).__name__} has {model.parameters} weights, but the run to resume "
            f"has {saved}; accepted: the model that the run began with"
        )


def build_checked(model: Model, seed: int, precision: str = "float32") -> "keras.Sequential":
    """Build a model; refuse one that clients would train differently from Keras.

    Args:
        model: what is to be trained.
        seed: of the run.
        precision: `float32` or `bfloat16`.

    Raises:
        UserError: the model, the layer and the reason.
    """
    import keras

    name = type(model).__name__
    try:
        built = model.build(seed, precision)
        if type(built) is keras.Sequential and not built.built:
            built.build((None, *IMAGE))
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(
            f"model {name}: build({seed}, {precision!r}) raises {type(error).__name__}: {reason}; "
            "correct it"
        ) from error
    if type(built) is not keras.Sequential:
        raise UserError(
            f"model {name}: build returns a {type(built).__name__}; accepted: keras.Sequential, "
            "whose layers follow one another"
        )
    layers = layers_of(built)
    shape: tuple[int | None, ...] = (None, *IMAGE)
    trained = {id(weight) for weight in built.trainable_weights}
    for place, layer in enumerate(layers):
        if any(layer is other for other in layers[:place]):
            reason = "occurs twice; accepted: once; make a second layer"
        else:
            reason = _objection(layer, shape)
        if not reason and any(id(weight) not in trained for weight in layer.weights):
            reason = "has weights that are not trained; accepted: all trainable"
        if reason:
            raise UserError(
                f"model {name}: layer {printable(layer.name)} ({type(layer).__name__}) {reason}"
            )
        shape = layer.compute_output_shape(shape)
    if tuple(built.input_shape) != (None, *IMAGE) or tuple(built.output_shape) != (None, CLASSES):
        raise UserError(
            f"model {name}: takes {built.input_shape} and returns {built.output_shape}; accepted: "
            f"{(None, *IMAGE)} and {(None, CLASSES)}, one logit a class"
        )
    if (dtype := built.inputs[0].dtype) != "float32":
        raise UserError(f"model {name}: takes {dtype}; accepted: float32 pixels in 0..1")
    last = layers[-1]
    squashing = (keras.activations.softmax, keras.activations.sigmoid)
    if isinstance(last, keras.layers.Softmax) or getattr(last, "activation", None) in squashing:
        raise UserError(
            f"model {name}: layer {printable(last.name)} makes probabilities of the logits, which "
            "the loss does already; accepted: logits; leave its activation away"
        )
    if last.compute_dtype != "float32":
        raise UserError(
            f"model {name}: layer {printable(last.name)} computes logits in {last.compute_dtype}; "
            "accepted: float32"
        )
    if (stated := getattr(model, "parameters", None)) != built.count_params():
        raise UserError(
            f"model {name}: parameters is {stated}, but build makes {built.count_params()} "
            "weights; correct the property `parameters`"
        )
    return built


def layers_of(built: "keras.Sequential") -> list["keras.Layer"]:
    """Return the layers of a model in their order, those of nested models in place of these."""
    import keras

    found = list[keras.Layer]()
    for layer in built.layers:
        found += layers_of(layer) if type(layer) is keras.Sequential else [layer]
    return found


def _objection(layer: "keras.Layer", shape: tuple[int | None, ...]) -> str:
    """Return why clients would not train a layer as Keras does, empty if they do.

    Args:
        layer: of a model.
        shape: of its input.
    """
    import keras

    if type(layer) not in [getattr(keras.layers, name, None) for name in LAYERS]:
        return f"is none of the layers that femfed trains; accepted: {', '.join(LAYERS)}"
    if isinstance(getattr(layer, "activation", None), keras.Layer):
        return "has a layer as its activation; accepted: a function; add the layer behind it"
    if layer.activity_regularizer or any(weight.regularizer for weight in layer.weights):
        return (
            "has a regularizer, which the loss would lack; accepted: none; local.weight_decay "
            "decays all weights"
        )
    if any(weight.constraint for weight in layer.weights):
        return "has a constraint, which local steps would ignore; accepted: none"
    if wrong := {weight.dtype for weight in layer.weights} - {"float32"}:
        return f"has weights in {wrong.pop()}; accepted: float32"
    if layer.compute_dtype not in ("float32", "bfloat16"):
        return f"computes in {layer.compute_dtype}; accepted: float32, or bfloat16 by precision"
    if getattr(layer, "data_format", None) == "channels_first":
        return "has data_format=channels_first; accepted: channels_last"
    if isinstance(layer, keras.layers.Dropout):
        if layer.noise_shape is not None:
            return f"has noise_shape={layer.noise_shape}; accepted: None"
    elif len(layer.variables) > len(layer.weights):
        return "draws random numbers of its own; accepted: those of Dropout only"
    if isinstance(layer, keras.layers.Dense) and len(shape) != 2:
        return f"has an input of shape {shape}; accepted: [n, features]; put a Flatten before it"
    return ""


def _require(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise UserError(f"model.{name}={value}; expected {expected}")


def _glorot(seed: int, layer: int) -> "keras.Initializer":
    """Return Glorot's uniform initializer, seeded by the run and the layer's place.

    Keras seeds an initializer that is given none from Python's global generator.
    """
    import keras

    draw = int(generator(seed, "initial weights", client=layer).integers(2**31))
    return keras.initializers.GlorotUniform(seed=draw)


def _sequential(
    name: str, invert: bool, precision: str, stack: Sequence["keras.Layer"]
) -> "keras.Sequential":
    """Chain `stack` behind the input; its last layer makes the logits."""
    import keras

    if precision != "float32":
        for layer in stack[:-1]:
            layer.dtype_policy = f"mixed_{precision}"
    first = [keras.layers.Rescaling(-1.0, offset=1.0)] if invert else []
    return keras.Sequential([keras.Input(IMAGE), *first, *stack], name=name)


@dataclass(frozen=True)
class CNN:
    """The CNN with dropout of the EMNIST experiments of Adaptive Federated Optimization.

    Two 3x3 convolutions (32 and 64 filters, no padding, ReLU), max-pooling, dropout, Dense 128
    ReLU, dropout, Dense 62: 1,206,590 parameters.

    Source: S. Reddi, Z. Charles, M. Zaheer et al., "Adaptive Federated Optimization", ICLR 2021,
    https://arxiv.org/abs/2003.00295

    Attributes:
        invert: whether the first layer turns dark ink into 1.
        dropout: rate behind the pooling, in [0, 1).
        dense_dropout: rate behind the hidden dense layer, in [0, 1).
    """

    invert: bool
    dropout: float
    dense_dropout: float

    def __post_init__(self) -> None:
        _require(0 <= self.dropout < 1, "dropout", self.dropout, "0 <= rate < 1")
        _require(0 <= self.dense_dropout < 1, "dense_dropout", self.dense_dropout, "0 <= rate < 1")

    @property
    def parameters(self) -> int:
        """Number of weights, 1,206,590."""
        return _sizes(3 * 3 * 1, 32) + _sizes(3 * 3 * 32, 64) + _sizes(12 * 12 * 64, 128, CLASSES)

    def build(self, seed: int, precision: str = "float32") -> "keras.Sequential":
        """Return the model with initial weights drawn from `seed`."""
        from keras import layers

        return _sequential(
            "cnn",
            self.invert,
            precision,
            [
                layers.Conv2D(32, 3, activation="relu", kernel_initializer=_glorot(seed, 0)),
                layers.Conv2D(64, 3, activation="relu", kernel_initializer=_glorot(seed, 1)),
                layers.MaxPooling2D(2),
                layers.Dropout(self.dropout, seed=0),
                layers.Flatten(),
                layers.Dense(128, activation="relu", kernel_initializer=_glorot(seed, 2)),
                layers.Dropout(self.dense_dropout, seed=0),
                layers.Dense(CLASSES, kernel_initializer=_glorot(seed, 3)),
            ],
        )


@dataclass(frozen=True)
class PooledCNN:
    """The CNN of LEAF and of the original FedAvg paper, which differ in the dense layer's width.

    Two rounds of 5x5 convolution (32, then 64 filters, same padding, ReLU) and max-pooling, Dense
    ReLU, Dense 62: 6,603,710 parameters with 2048 units (LEAF, and the homework this grew from),
    1,690,046 with 512 (FedAvg).

    Sources: S. Caldas et al., "LEAF: A Benchmark for Federated Settings", 2018,
    https://arxiv.org/abs/1812.01097; B. McMahan et al., "Communication-Efficient Learning of Deep
    Networks from Decentralized Data", AISTATS 2017, https://arxiv.org/abs/1602.05629

    Attributes:
        invert: whether the first layer turns dark ink into 1.
        units: width of the hidden dense layer.
    """

    invert: bool
    units: int

    def __post_init__(self) -> None:
        _require(self.units >= 1, "units", self.units, "at least 1")

    @property
    def parameters(self) -> int:
        """Number of weights."""
        convolutions = _sizes(5 * 5 * 1, 32) + _sizes(5 * 5 * 32, 64)
        return convolutions + _sizes(7 * 7 * 64, self.units, CLASSES)

    def build(self, seed: int, precision: str = "float32") -> "keras.Sequential":
        """Return the model with initial weights drawn from `seed`."""
        from keras import layers

        return _sequential(
            "pooled_cnn",
            self.invert,
            precision,
            [
                layers.Conv2D(
                    32, 5, padding="same", activation="relu", kernel_initializer=_glorot(seed, 0)
                ),
                layers.MaxPooling2D(2),
                layers.Conv2D(
                    64, 5, padding="same", activation="relu", kernel_initializer=_glorot(seed, 1)
                ),
                layers.MaxPooling2D(2),
                layers.Flatten(),
                layers.Dense(self.units, activation="relu", kernel_initializer=_glorot(seed, 2)),
                layers.Dense(CLASSES, kernel_initializer=_glorot(seed, 3)),
            ],
        )


@dataclass(frozen=True)
class Dense:
    """Dense layers only: FedAvg's 2NN with two hidden layers of 200, logistic regression with none.

    209,662 parameters for the 2NN, 48,670 for logistic regression.

    Source: B. McMahan et al., "Communication-Efficient Learning of Deep Networks from
    Decentralized Data", AISTATS 2017, https://arxiv.org/abs/1602.05629

    Attributes:
        invert: whether the first layer turns dark ink into 1.
        units: widths of the hidden layers, each followed by ReLU.
    """

    invert: bool
    units: tuple[int, ...]

    def __post_init__(self) -> None:
        _require(all(width >= 1 for width in self.units), "units", self.units, "at least 1 each")

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return _sizes(28 * 28, *self.units, CLASSES)

    def build(self, seed: int, precision: str = "float32") -> "keras.Sequential":
        """Return the model with initial weights drawn from `seed`."""
        from keras import layers

        hidden = [
            layers.Dense(width, activation="relu", kernel_initializer=_glorot(seed, place))
            for place, width in enumerate(self.units)
        ]
        logits = layers.Dense(CLASSES, kernel_initializer=_glorot(seed, len(hidden)))
        return _sequential("dense", self.invert, precision, [layers.Flatten(), *hidden, logits])


def _sizes(*widths: int) -> int:
    """Return the weights and biases of dense layers between these widths."""
    return sum((before + 1) * after for before, after in itertools.pairwise(widths))

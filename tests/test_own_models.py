"""A user's model trains as in Keras, or is refused in one line before workers start."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from femfed import UserError
from femfed.models import CLASSES, build_checked, check_model
from tests.test_bad_input import refused
from tests.test_client import PLAIN, SEED, a_writer, by_hand, make
from tests.test_resume import TINY, typed

Stack = Callable[[], Sequence[keras.Layer]]


def seeded(number: int) -> Any:
    return keras.initializers.GlorotUniform(seed=number)


def logits(**settings: Any) -> keras.Layer:
    return layers.Dense(CLASSES, **{"kernel_initializer": seeded(99), **settings})


class Own:
    """A model of these layers, with the number of its parameters if none is stated."""

    def __init__(self, stack: Stack, parameters: int | None = None) -> None:
        self._stack, self._parameters = stack, parameters

    @property
    def parameters(self) -> int:
        return self._parameters or self.build(0).count_params()

    def build(self, seed: int, precision: str = "float32") -> keras.Sequential:
        return keras.Sequential([keras.Input((28, 28, 1)), *self._stack()])


def behind(*some: Callable[[], keras.Layer]) -> Stack:
    """Return a stack of these layers between images and logits."""
    return lambda: [*(make_layer() for make_layer in some), layers.Flatten(), logits()]


def conv(filters: int = 3, **settings: Any) -> keras.Layer:
    return layers.Conv2D(filters, 3, **{"kernel_initializer": seeded(1), **settings})


def dense(units: int = 5, **settings: Any) -> keras.Layer:
    return layers.Dense(units, **{"kernel_initializer": seeded(2), **settings})


def small() -> list[keras.Layer]:
    return [layers.AveragePooling2D(4), layers.Flatten()]


# what trains as in Keras

TRAINED: dict[str, Stack] = {
    "no bias": lambda: [
        conv(activation="relu", use_bias=False),
        layers.MaxPooling2D(4),
        layers.Flatten(),
        dense(use_bias=False, activation="tanh"),
        logits(use_bias=False),
    ],
    "bias before the pooling": behind(
        lambda: conv(activation="relu", bias_initializer="ones"), lambda: layers.MaxPooling2D(4)
    ),
    "LayerNormalization": lambda: [*small(), dense(), layers.LayerNormalization(), logits()],
    "GroupNormalization": behind(
        lambda: conv(4), lambda: layers.GroupNormalization(2), lambda: layers.MaxPooling2D(4)
    ),
    "PReLU": lambda: [*small(), dense(), layers.PReLU(), logits()],
    "SeparableConv2D": behind(
        lambda: layers.SeparableConv2D(
            3, 3, depthwise_initializer=seeded(3), pointwise_initializer=seeded(4)
        ),
        lambda: layers.AveragePooling2D(4),
    ),
    "DepthwiseConv2D": behind(
        lambda: layers.DepthwiseConv2D(3, strides=2, depthwise_initializer=seeded(3)),
        lambda: layers.Activation("gelu"),
        lambda: layers.GlobalAveragePooling2D(keepdims=True),
    ),
    "Conv2DTranspose": behind(
        lambda: layers.AveragePooling2D(4),
        lambda: layers.Conv2DTranspose(2, 3, kernel_initializer=seeded(3)),
        lambda: layers.Permute((3, 1, 2)),
    ),
    "nested": lambda: [
        keras.Sequential([conv(activation="relu"), layers.MaxPooling2D(4)]),
        layers.Flatten(),
        keras.Sequential([dense(activation="relu"), keras.Sequential([logits()])]),
    ],
    "nested with an input": lambda: [
        *small(),
        keras.Sequential([keras.Input((49,)), dense(1200), dense(1200, activation="relu")]),
        logits(),
    ],
}


@pytest.mark.parametrize("name", TRAINED)
def test_a_model_trains_as_in_keras(name: str) -> None:
    model, writer = Own(TRAINED[name]), a_writer(45)
    check_model(model, SEED, "float32")
    training = make(PLAIN, model)

    outcome = training.train(writer, 3, 8)
    update = np.empty(training.parameters, np.float32)
    training.delta(update)

    expected, loss_sum, correct = by_hand(model, PLAIN, writer, 3, 8)
    np.testing.assert_allclose(update, expected, atol=1e-6, rtol=0)
    assert np.abs(expected).max() > 1e-3
    assert outcome.correct == correct
    assert outcome.loss_sum == pytest.approx(loss_sum, rel=1e-5)


def test_a_model_without_an_input_is_built_for_images(tmp_path: Path) -> None:
    class Late(Own):
        def build(self, seed: int, precision: str = "float32") -> keras.Sequential:
            return keras.Sequential(self._stack())

    model = Late(behind(conv), 3 * (9 + 1) + (26 * 26 * 3 + 1) * CLASSES)

    training = make(PLAIN, model)
    training.save(tmp_path / "model.keras")

    assert training.parameters == model.parameters
    assert keras.models.load_model(tmp_path / "model.keras").count_params() == model.parameters


def test_dropout_in_a_nested_model_drops() -> None:
    def stack(rate: float) -> Stack:
        return lambda: [
            *small(),
            keras.Sequential([dense(), keras.Sequential([layers.Dropout(rate, seed=0)])]),
            logits(),
        ]

    updates = []
    for rate in (0.0, 0.5, 0.5):
        training = make(PLAIN, Own(stack(rate)))
        training.train(a_writer(45), 3, 8)
        updates.append(np.empty(training.parameters, np.float32))
        training.delta(updates[-1])

    assert np.array_equal(updates[1], updates[2])
    assert not np.array_equal(updates[0], updates[1])


# what is refused


class Doubling(layers.Layer):
    def call(self, x: Any) -> Any:
        return 2 * x


class Quiet(layers.Dropout):
    """A subclass may do anything."""


def shared() -> Sequence[keras.Layer]:
    twice = dense(49)
    return [*small(), keras.Sequential([twice]), keras.Sequential([twice]), logits()]


def frozen() -> keras.Layer:
    layer = conv()
    layer.trainable = False
    return layer


def frozen_block() -> keras.Layer:
    block = keras.Sequential([keras.Input((28, 28, 1)), conv()])
    block.trainable = False
    return block


REFUSED: dict[str, tuple[Stack, str]] = {
    "GaussianNoise": (behind(lambda: layers.GaussianNoise(0.9, name="noise")), "layer noise"),
    "GaussianDropout": (behind(lambda: layers.GaussianDropout(0.5)), "GaussianDropout"),
    "AlphaDropout": (behind(lambda: layers.AlphaDropout(0.5)), "AlphaDropout"),
    "SpatialDropout2D": (behind(conv, lambda: layers.SpatialDropout2D(0.5)), "SpatialDropout2D"),
    "RandomRotation": (behind(lambda: layers.RandomRotation(0.1)), "RandomRotation"),
    "BatchNormalization": (behind(lambda: layers.BatchNormalization()), "BatchNormalization"),
    "Lambda": (behind(lambda: layers.Lambda(lambda x: x)), "Lambda"),
    "own layer": (behind(Doubling), "Doubling"),
    "own subclass": (behind(lambda: Quiet(0.5)), "Quiet"),
    "noise in a nested model": (
        behind(lambda: keras.Sequential([layers.GaussianNoise(0.5)])),
        "GaussianNoise",
    ),
    "functional block": (
        behind(lambda: keras.Model(x := keras.Input((28, 28, 1)), layers.ReLU()(x))),
        "Functional",
    ),
    "noise_shape": (
        behind(lambda: layers.Dropout(0.5, noise_shape=(None, 1, 1, 1))),
        "noise_shape",
    ),
    "kernel_regularizer": (behind(lambda: conv(kernel_regularizer="l2")), "regularizer.*decay"),
    "gamma_regularizer": (
        behind(lambda: layers.LayerNormalization(gamma_regularizer="l1")),
        "regularizer",
    ),
    "activity_regularizer": (behind(lambda: conv(activity_regularizer="l2")), "regularizer"),
    "constraint": (behind(lambda: conv(bias_constraint="non_neg")), "constraint"),
    "frozen": (behind(frozen), "not trained"),
    "frozen block": (behind(frozen_block), "not trained"),
    "float64": (behind(lambda: conv(dtype="float64")), "float64"),
    "float16": (behind(lambda: conv(dtype="mixed_float16")), "float16"),
    "channels_first": (
        behind(lambda: layers.Flatten(data_format="channels_first")),
        "channels_first",
    ),
    "activation layer": (behind(lambda: conv(activation=layers.GaussianNoise(0.5))), "activation"),
    "dense on images": (behind(dense), "Flatten"),
    "a layer twice": (shared, "occurs twice"),
    "10 classes": (lambda: [*small(), layers.Dense(10)], r"\(None, 10\).*62"),
    "images out": (lambda: [conv()], r"\(None, 26, 26, 3\).*62"),
    "softmax": (lambda: [*small(), logits(activation="softmax")], "logits"),
    "softmax layer": (lambda: [*small(), logits(), layers.Softmax()], "logits"),
    "half logits": (lambda: [*small(), logits(dtype="mixed_bfloat16")], "bfloat16"),
    "no such shape": (lambda: [layers.Reshape((5, 5)), logits()], "ValueError"),
    "unseeded weights": (lambda: [*small(), layers.Dense(CLASSES, name="top")], "top.*seed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_would_train_differently_is_refused(name: str) -> None:
    stack, words = REFUSED[name]

    with pytest.raises(UserError, match=words) as refusal:
        check_model(Own(stack, parameters=None if "shape" not in name else 1), 0, "float32")

    assert "\n" not in str(refusal.value)
    assert str(refusal.value).startswith("model Own: ")


@pytest.mark.parametrize("name", ["GaussianNoise", "kernel_regularizer", "10 classes"])
def test_no_client_trains_what_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="model Own: "):
        make(model=Own(REFUSED[name][0]))


def test_a_functional_model_is_refused() -> None:
    class Residual(Own):
        def build(self, seed: int, precision: str = "float32") -> Any:
            x = keras.Input((28, 28, 1))
            return keras.Model(x, logits()(layers.Flatten()(layers.Add()([x, x]))))

    with pytest.raises(UserError, match=r"model Residual: build returns a Functional; accepted:"):
        build_checked(Residual(lambda: [], 1), 0)


def test_a_wrong_number_of_parameters_is_refused() -> None:
    with pytest.raises(UserError, match=r"parameters is 3, but build makes 3100 weights"):
        build_checked(Own(lambda: [*small(), logits()], parameters=3), 0)


# from the command line


@dataclass(frozen=True)
class Noisy:
    noise: float

    @property
    def parameters(self) -> int:
        return self.build(0).count_params()

    def build(self, seed: int, precision: str = "float32") -> keras.Sequential:
        noise = [layers.GaussianNoise(self.noise, name="shake")] if self.noise else []
        return keras.Sequential([keras.Input((28, 28, 1)), *noise, *small(), logits()])


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Put a model where a user would, and return the overrides that choose it."""
    module = ModuleType("femfed.mine")
    module.Noisy = Noisy  # type: ignore[attr-defined]
    monkeypatch.setattr(Noisy, "__module__", "femfed.mine")
    monkeypatch.setitem(sys.modules, "femfed.mine", module)
    return ["model._target_=femfed.mine.Noisy", "~model.invert", "~model.units"]


@pytest.mark.parametrize("engine", ["ray", "inline"])
def test_a_model_is_refused_before_workers_start(
    engine: str, own: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("ray.RayEngine", "inline.InlineEngine"):
        monkeypatch.setattr(f"femfed.engine.{kind}.__enter__", None)  # would end the test
    overrides = [*TINY[:-1], f"engine={engine}", *own, "+model.noise=0.9"]

    line = refused(tmp_path, monkeypatch, *overrides)

    assert "model Noisy: layer shake (GaussianNoise) is none of the layers" in line
    assert not (tmp_path / "cache").exists()


def test_a_model_of_the_users_own_runs(
    own: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [f"cache={tmp_path}/cache", f"hydra.run.dir={tmp_path}/run"]

    code, _, err = typed(monkeypatch, *TINY, "rounds=1", *own, "+model.noise=0", *paths)

    assert (code, err) == (0, "")
    assert keras.models.load_model(tmp_path / "run" / "model.keras").count_params() == 3100

    changed = Own(lambda: [layers.Flatten(), logits(use_bias=False)])
    monkeypatch.setattr(Noisy, "build", lambda _, seed, *precision: changed.build(seed))
    code, _, err = typed(monkeypatch, f"resume={tmp_path}/run", "rounds=2")

    assert code == 2
    assert "model Noisy has 48608 weights, but the run to resume has 3100" in err
    assert len(err.splitlines()) == 1

"""The client: a plain loop written here is the truth for the compiled local epoch."""

import gc
import itertools
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from femfed import config
from femfed.client import LocalTraining, _view, forget
from femfed.data.store import CLASSES, Writer
from femfed.deferred import Deferred
from femfed.forward import Dropouts, forward
from femfed.linear import Linear
from femfed.local import DivergedError, Local, flatten, is_finite, unflatten
from femfed.models import CNN, Dense, Model, PooledCNN
from femfed.seeds import generator
from femfed.strategies.base import Strategy
from femfed.strategies.ditto import Ditto
from femfed.strategies.fedavg import FedAvg
from femfed.strategies.feddyn import FedDyn
from femfed.strategies.fedprox import FedProx
from femfed.strategies.fedrep import FedRep
from femfed.strategies.local_only import LocalOnly
from femfed.strategies.mime_lite import MimeLite
from femfed.strategies.scaffold import Scaffold

SEED = 11
PLAIN = Local(epochs=1, batch_size=20, learning_rate=0.1, momentum=0.0, weight_decay=0.0)
SLOW = replace(PLAIN, learning_rate=0.03)
LOGISTIC, TWO_LAYERS = Dense(True, ()), Dense(True, (200, 200))
WIDE = Dense(True, (2048,))  # its first kernel is large enough to defer 13 steps of twenty images
HUGE = PooledCNN(True, 1400)  # its kernel has a transposed copy
DEEP = Dense(True, (2048, 2048))  # the second kernel as well, and slopes pass through it
SIZES = (1, 19, 20, 21, 60)  # below, at and above a batch, and several batches


def a_writer(examples: int, held_out: int = 0) -> Writer:
    """A writer of noise, whose rows to train on are scattered among those held out."""
    draw = np.random.default_rng(examples)
    n = examples + held_out
    rows = draw.permutation(n).astype(np.int32)
    return Writer(
        name=f"f{examples:04}_00",
        number=0,
        subject_number=0,
        images=draw.integers(0, 256, (n, 28, 28), np.uint8),
        labels=draw.integers(0, CLASSES, n, np.uint8),
        train=np.sort(rows[:examples]),
        test=np.sort(rows[examples:]),
    )


def make(
    local: Local = PLAIN,
    model: Model = LOGISTIC,
    strategy: Strategy | None = None,
    precision: str = "float32",
) -> LocalTraining:
    return LocalTraining(model, strategy or FedAvg(), local, SEED, precision)


def delta_after(training: LocalTraining, *where: Any) -> np.ndarray:
    """Train on (writer, round, client) and return what the client came to."""
    training.train(*where)
    vector = np.empty(training.parameters, np.float32)
    training.delta(vector)
    return vector


def pixels(writer: Writer, rows: np.ndarray) -> np.ndarray:
    return writer.images[rows, ..., np.newaxis].astype(np.float32) / np.float32(255)


def by_hand(
    spec: Model, local: Local, writer: Writer, round: int, client: int, proximal_mu: float = 0.0
) -> tuple[np.ndarray, float, int]:
    """Train step by step; decay and the proximal term stand in the loss, not in the gradient.

    Returns:
        the update as one vector; loss sum and correct images of the last epoch.
    """
    model = spec.build(SEED)
    weights = model.trainable_variables
    initial = [w.numpy() for w in weights]
    optimizer = keras.optimizers.SGD(local.learning_rate, momentum=local.momentum)
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")
    draw = generator(SEED, "batches", round, client)
    for _ in range(local.epochs):
        order, loss_sum, correct = draw.permutation(writer.train), 0.0, 0
        for start in range(0, len(order), local.batch_size):
            rows = order[start : start + local.batch_size]
            labels = writer.labels[rows]
            with tf.GradientTape() as tape:
                logits = model(pixels(writer, rows), training=True)
                batch_sum = cross_entropy(labels, logits)
                loss = batch_sum / len(rows)
                for w, w0 in zip(weights, initial, strict=True):
                    loss += local.weight_decay / 2 * tf.reduce_sum(w.value**2)
                    loss += proximal_mu / 2 * tf.reduce_sum((w.value - w0) ** 2)
            optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
            loss_sum += float(batch_sum)
            correct += int((np.argmax(logits, axis=-1) == labels).sum())
    update = [w.numpy() - w0 for w, w0 in zip(weights, initial, strict=True)]
    return flatten(update), loss_sum, correct


# one trace


def test_writers_of_every_size_share_one_trace() -> None:
    training = make(replace(PLAIN, epochs=2))

    for examples in (*SIZES, *SIZES):
        writer = a_writer(examples, held_out=3)
        training.train(writer, 1, examples)
        training.evaluate(writer, writer.test)
        training.evaluate(writer, writer.train)

    assert training.traces == 1
    assert training._evaluate.experimental_get_tracing_count() == 1


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "ditto", "mime_lite", "fine_tuning"])
def test_a_model_that_is_gone_leaves_no_graph(name: str) -> None:
    """A sweep's workers build one after the other."""

    def graphs() -> int:
        return sum(type(each).__name__ == "FuncGraph" for each in gc.get_objects())

    strategy = config.make(config.compose([f"strategy={name}"]).strategy, "strategy")
    writer = a_writer(45, held_out=5)
    forget()
    before = graphs()
    training = make(PLAIN, DEEP, strategy)
    training.load_memory(None)
    training.train(writer, 3, 8)
    training.evaluate(writer, writer.test)
    training.evaluate_personal(writer, 0)
    assert graphs() > before

    del training
    forget()

    assert graphs() == before
    assert make(PLAIN, WIDE).model.layers[0].name == "rescaling"  # not rescaling_1


# the mathematics


def assert_trains_as_by_hand(
    training: LocalTraining, model: Model, local: Local, examples: int
) -> None:
    writer = a_writer(examples, held_out=5)

    outcome = training.train(writer, 3, 8)
    vector = np.empty(training.parameters, np.float32)
    training.delta(vector)

    expected, loss_sum, correct = by_hand(model, local, writer, 3, 8)
    np.testing.assert_allclose(vector, expected, atol=1e-6, rtol=0)
    assert np.abs(expected).max() > 1e-3
    assert (outcome.examples, outcome.correct) == (examples, correct)
    assert outcome.loss_sum == pytest.approx(loss_sum, rel=1e-5)


@pytest.mark.parametrize(
    ("model", "local"),
    [
        pytest.param(LOGISTIC, PLAIN, id="logistic"),
        pytest.param(TWO_LAYERS, PLAIN, id="2nn"),
        pytest.param(TWO_LAYERS, replace(PLAIN, epochs=2, batch_size=7), id="epochs"),
        pytest.param(LOGISTIC, replace(PLAIN, epochs=2, momentum=0.9), id="momentum"),
        pytest.param(TWO_LAYERS, replace(PLAIN, weight_decay=0.01), id="decay"),
        pytest.param(
            TWO_LAYERS, replace(PLAIN, epochs=2, momentum=0.5, weight_decay=0.1), id="both"
        ),
        pytest.param(CNN(True, 0.0, 0.0), SLOW, id="cnn"),
    ],
)
def test_training_equals_a_plain_loop(model: Model, local: Local) -> None:
    assert_trains_as_by_hand(make(local, model), model, local, examples=45)  # 20, 20 and 5


@pytest.mark.parametrize(
    ("model", "local"),
    [
        pytest.param(WIDE, PLAIN, id="wide"),
        pytest.param(WIDE, replace(PLAIN, epochs=6), id="wide-epochs"),  # 245 rows and 25
        pytest.param(WIDE, replace(PLAIN, epochs=6, batch_size=7), id="wide-batches"),
        pytest.param(WIDE, replace(PLAIN, epochs=6, weight_decay=0.1), id="wide-decay"),
        pytest.param(PooledCNN(True, 512), SLOW, id="pooled"),
        pytest.param(HUGE, replace(PLAIN, epochs=8, learning_rate=0.003), id="huge"),  # 335 and 25
    ],
)
@pytest.mark.parametrize("examples", [1, 20, 45])
def test_deferred_steps_equal_a_plain_loop(model: Model, local: Local, examples: int) -> None:
    training = make(local, model)
    assert len(training._deferred) == 1
    assert_trains_as_by_hand(training, model, local, examples)


@pytest.mark.parametrize("model", [TWO_LAYERS, WIDE, CNN(True, 0.0, 0.0), PooledCNN(True, 64)])
def test_gradients_equal_those_of_the_keras_model(model: Model) -> None:
    training, plain, writer = make(model=model), model.build(SEED), a_writer(20)
    x, labels = pixels(writer, writer.train), writer.labels.astype(np.int32)

    traced = tf.function(training._gradients, autograph=False)
    losses, logits, gradients, _ = traced(tf.constant(x), tf.constant(labels))

    with tf.GradientTape() as tape:
        expected = plain(x, training=True)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(labels, expected)
    np.testing.assert_allclose(logits, expected, atol=1e-6)
    assert float(tf.reduce_mean(losses)) == pytest.approx(float(loss), rel=1e-6)
    variables = [variable.value for variable in plain.trainable_variables]
    for ours, theirs in zip(gradients, tape.gradient(loss, variables), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_linear_finds_the_factors_of_a_sum() -> None:
    x, y = Linear.of("x"), Linear.of("y")

    assert (2 * (x - y) + x / 4 + -y).factors == {"x": 2.25, "y": -3.0}
    assert (x + y * 0.5).factors == {"x": 1.0, "y": 0.5}
    for more in (lambda: x * y, lambda: x**2, lambda: x + 1.0, lambda: 1.0 / x, lambda: x / y):
        with pytest.raises(TypeError):
            more()


@dataclass(frozen=True)
class By(Strategy):
    """Corrects gradients by a function of them, of the weights and of what is remembered."""

    rule: Callable[[Sequence[Any], Sequence[Any], dict[str, Any]], Sequence[Any]]

    def new_memory(self, weights: list[np.ndarray]) -> dict[str, list[np.ndarray]]:
        return {"bias": [weights[1].copy()]}

    def correct_gradients(self, *given: Any) -> Sequence[Any]:
        gradients, weights, _, memory, _ = given
        return self.rule(gradients, weights, memory)


def kernels(training: LocalTraining) -> list[int]:
    """The places among the weights of kernels whose steps are deferred."""
    places = [id(weight) for weight in training._weights]
    return [places.index(id(each.kernel)) for each in training._deferred]


@pytest.mark.parametrize(
    "rule",
    [
        lambda g, w, m: [each * each for each in g],  # TypeError
        lambda g, w, m: [each / tf.norm(each) for each in g],  # ValueError
        lambda g, w, m: [each * each.shape[0] for each in g],  # AttributeError
        lambda g, w, m: [each + m["bias"][0] for each in g],  # not of its shape
        lambda g, w, m: [g[2], *g[1:]],
    ],
)
def test_no_step_is_deferred_along_what_is_no_sum_of_like_arrays(rule: Any) -> None:
    assert not make(PLAIN, WIDE, By(rule))._deferred


@pytest.mark.parametrize(
    ("rule", "deferred"),
    [
        (lambda g, w, m: g, [0, 2, 4]),
        (lambda g, w, m: [*g[:2], g[2] + w[4], *g[3:]], [0]),
        (lambda g, w, m: [*g[:4], g[4] - 0.5 * g[2], *g[5:]], [0]),
        (lambda g, w, m: [*g[:4], g[4] - 0.0 * g[2], *g[5:]], [0, 2, 4]),
    ],
)
def test_no_step_is_deferred_that_another_kernel_depends_on(rule: Any, deferred: list[int]) -> None:
    """Neither its gradient nor the kernel are at hand at every step then."""
    assert kernels(make(PLAIN, Dense(True, (2048, 2048, 2048)), By(rule))) == deferred


@pytest.mark.parametrize(
    ("local", "strategy", "model"),
    [
        (PLAIN, FedRep(personal_arrays=2, head_share=0.5), DEEP),  # in phases
        (replace(PLAIN, momentum=0.5), FedAvg(), DEEP),
        (replace(PLAIN, batch_size=100), FedAvg(), WIDE),  # as much work kept as taken
        (PLAIN, FedAvg(), CNN(True, 0.25, 0.5)),  # thin
        (PLAIN, Scaffold(1.0, "uniform"), WIDE),  # a second product costs more
    ],
)
def test_no_step_is_deferred_where_it_cannot_be_or_does_not_pay(
    local: Local, strategy: Strategy, model: Model
) -> None:
    assert not make(local, model, strategy)._deferred


def test_fedprox_sends_what_is_kept() -> None:
    training = make(PLAIN, DEEP, FedProx(0.1))

    training.train(a_writer(45), 1, 0)

    assert kernels(training) == [0, 2]
    assert all(each.update is not None for each in training._deferred)


@pytest.mark.parametrize("epochs", [1, 9])  # 45 rows are kept, of 405 most are taken on the way
@pytest.mark.parametrize(
    ("strategy", "decay", "count"),
    [
        pytest.param(FedAvg(), 0.0, 2, id="fedavg"),
        pytest.param(FedAvg(), 0.1, 2, id="decay"),
        pytest.param(FedProx(0.5), 0.0, 2, id="fedprox"),
        pytest.param(FedProx(0.5), 0.1, 2, id="fedprox-decay"),
        pytest.param(Scaffold(1.0, "uniform"), 0.0, 1, id="scaffold"),
        pytest.param(FedDyn(0.3, "uniform"), 0.0, 1, id="feddyn"),
        pytest.param(MimeLite(1.0, 0.9, "uniform"), 0.0, 1, id="mime_lite"),
        pytest.param(Ditto(0.4), 0.0, 3, id="ditto"),
    ],
)
def test_deferred_steps_equal_steps_one_by_one(
    strategy: Strategy,
    decay: float,
    count: int,
    epochs: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    local = replace(PLAIN, epochs=epochs, learning_rate=0.009, weight_decay=decay)
    draw = np.random.default_rng(0)
    noise = [0.002 * draw.standard_normal(6_000_000, np.float32) for _ in range(3)]

    def trained(precision: str, deferred: int) -> list[np.ndarray]:
        """Return update and memory of a client that was trained between others."""
        training = make(local, DEEP, strategy, precision)
        assert len([*training._deferred, *training._personal_deferred]) == deferred
        n, start = training.parameters, flatten(training.initial_weights)
        broadcast = [noise[1][:n] for _ in strategy.broadcasts]
        training.load(np.concatenate([start + noise[0][:n], *broadcast]))
        came_to = []
        for client, examples in ((3, 45), (4, 20), (5, 0), (3, 45)):
            if strategy.remembers:
                its = noise[2][client : client + n]
                training.load_memory(start + its if isinstance(strategy, Ditto) else its)
            update = delta_after(training, a_writer(examples), 2, client)
            came_to.append([update, np.concatenate([update[:0], *training.memory()])])
        assert all(np.array_equal(*both) for both in zip(came_to[0], came_to[3], strict=True))
        assert not came_to[2][0].any()
        return came_to[0]

    ours, ours_in_half = trained("float32", count), trained("bfloat16", count)
    monkeypatch.setattr(Deferred, "steps", lambda *_, **__: 0)
    plain, plain_in_half = trained("float32", 0), trained("bfloat16", 0)

    for exact, its, half, its_half in zip(plain, ours, plain_in_half, ours_in_half, strict=True):
        # 2e-5, and 2e-3 where a ReLU is so near to its edge that rounding decides.
        assert np.linalg.norm(its - exact) <= 5e-3 * np.linalg.norm(exact)
        assert np.linalg.norm(its_half - exact) <= 1.25 * np.linalg.norm(half - exact)


# dropout


@pytest.mark.parametrize("rate", [0.25, 0.5, 0.3])  # in eighths of a byte, and not
def test_dropout_drops_its_share_and_scales_the_rest(rate: float) -> None:
    x = tf.ones([40, 50, 31])  # 62,000, no multiple of eight
    dropouts = Dropouts(tf.constant([3, 4]), tf.constant(0))

    dropped = dropouts.drop(x, 0, rate).numpy()

    zeros = dropped == 0
    assert zeros.mean() == pytest.approx(rate, abs=0.01)
    np.testing.assert_allclose(dropped[~zeros], 1 / (1 - rate), rtol=1e-6)
    for axis in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(zeros.mean(axis=axis) - rate).max() < 0.06
    assert np.array_equal(dropped, dropouts.drop(x, 0, rate))


def test_dropout_differs_by_layer_seed_and_step() -> None:
    x, drawn = tf.ones([4000]), []
    for seeds, step, place in (([3, 4], 0, 0), ([3, 4], 0, 1), ([5, 4], 0, 0), ([3, 4], 1, 0)):
        kept = Dropouts(tf.constant(seeds), tf.constant(step)).drop(x, place, 0.5) > 0
        drawn.append(kept.numpy())

    for place, one in enumerate(drawn):
        for other in drawn[:place]:
            assert (one == other).mean() == pytest.approx(0.5, abs=0.05)


# half precision


def test_half_precision_moves_nearly_the_same_way() -> None:
    writer, model = a_writer(45), CNN(True, 0.25, 0.5)
    local = replace(PLAIN, epochs=2)

    exact = delta_after(make(local, model), writer, 1, 2)
    training = make(local, model, precision="bfloat16")
    half = delta_after(training, writer, 1, 2)

    assert half.dtype == np.float32
    cosine = half @ exact / np.linalg.norm(half) / np.linalg.norm(exact)
    assert 0.95 < cosine < 1
    delta_after(training, a_writer(21), 1, 3)
    assert np.array_equal(half, delta_after(training, writer, 1, 2))
    assert np.array_equal(half, delta_after(make(local, model, precision="bfloat16"), writer, 1, 2))
    assert training.traces == 1


@pytest.mark.parametrize("model", [CNN(True, 0.0, 0.0), PooledCNN(True, 64)])
def test_half_precision_is_as_near_as_the_keras_model_in_it(model: Model) -> None:
    """Bias and ReLU come after the pooling here, before it there; the largest is the same."""
    writer, gradients, logits = a_writer(20), [], []
    x, labels = pixels(writer, writer.train), writer.labels.astype(np.int32)
    for precision in ("float32", "bfloat16"):
        traced = tf.function(make(model=model, precision=precision)._gradients, autograph=False)
        _, its_logits, its_gradients, _ = traced(tf.constant(x), tf.constant(labels))
        gradients.append([np.asarray(each, np.float32) for each in its_gradients])
        logits.append(its_logits)

    plain = model.build(SEED, "bfloat16")
    with tf.GradientTape() as tape:
        expected = plain(x, training=True)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(labels, expected)
    np.testing.assert_allclose(logits[1], expected, atol=2e-3)
    variables = [variable.value for variable in plain.trainable_variables]
    theirs = [np.asarray(each, np.float32) for each in tape.gradient(loss, variables)]
    for exact, ours, its in zip(*gradients, theirs, strict=True):
        size = np.linalg.norm(exact)
        assert np.linalg.norm(ours - exact) < 1.1 * np.linalg.norm(its - exact) + 0.001 * size


@pytest.mark.parametrize("model", [CNN(True, 0.0, 0.0), PooledCNN(True, 64)], ids=["cnn", "leaf"])
def test_gradients_of_biases_are_summed_in_single_precision(model: Model) -> None:
    """Thousands of slopes, of which bfloat16 would lose those much smaller than their sum."""
    x = tf.constant(np.random.default_rng(0).random((20, 28, 28, 1), np.float32))

    def gradients(precision: str) -> list[np.ndarray]:
        net = make(model=model, precision=precision).model
        for variable in net.trainable_variables:
            variable.assign(tf.fill(variable.shape, 0.01))  # all slopes have one sign
        biases = [each.bias.value for each in net.layers if isinstance(each, keras.layers.Conv2D)]
        traced = tf.function(
            lambda: tf.gradients(tf.reduce_sum(forward(net, x, None, [])[0]), biases),
            autograph=False,
        )
        return [np.asarray(each, np.float32) for each in traced()]

    for exact, ours in zip(gradients("float32"), gradients("bfloat16"), strict=True):
        np.testing.assert_allclose(ours, exact, rtol=0.03)


@pytest.mark.parametrize(("model", "epochs"), [(TWO_LAYERS, 2), (WIDE, 2), (WIDE, 6)])
@pytest.mark.parametrize("proximal_mu", [0.1, 1.0])
def test_fedprox_equals_the_term_in_the_loss(proximal_mu: float, model: Model, epochs: int) -> None:
    writer, local = a_writer(45), replace(PLAIN, epochs=epochs)

    vector = delta_after(make(local, model, FedProx(proximal_mu)), writer, 1, 2)

    expected, _, _ = by_hand(model, local, writer, 1, 2, proximal_mu)
    without, _, _ = by_hand(model, local, writer, 1, 2)
    np.testing.assert_allclose(vector, expected, atol=1e-6, rtol=0)
    assert np.linalg.norm(expected) < np.linalg.norm(without)


@pytest.mark.parametrize("model", [LOGISTIC, WIDE])
@pytest.mark.parametrize(
    "local", [PLAIN, replace(PLAIN, epochs=2, momentum=0.9, weight_decay=0.01)]
)
def test_fedprox_without_pull_is_fedavg(local: Local, model: Model) -> None:
    writer = a_writer(45)

    prox = delta_after(make(local, model, FedProx(0.0)), writer, 1, 2)
    average = delta_after(make(local, model, FedAvg()), writer, 1, 2)

    assert np.array_equal(prox, average)


def test_a_writer_with_nothing_to_train_on_changes_nothing() -> None:
    training = make()

    outcome = training.train(a_writer(0, held_out=3), 1, 0)
    vector = np.ones(training.parameters, np.float32)
    training.delta(vector)

    assert (outcome.examples, outcome.loss_sum, outcome.correct) == (0, 0.0, 0)
    assert not vector.any()


# a client's result depends on nothing else


@pytest.fixture(scope="module", params=[0.0, 0.5], ids=["plain", "momentum"])
def dropping(request: pytest.FixtureRequest) -> LocalTraining:
    """A model with both of its dropout layers, and two epochs."""
    return make(replace(PLAIN, epochs=2, momentum=request.param), CNN(True, 0.25, 0.5))


def test_who_was_trained_before_does_not_matter(dropping: LocalTraining) -> None:
    writer = a_writer(21, held_out=4)
    first = delta_after(dropping, writer, 2, 5)
    delta_after(dropping, a_writer(60), 1, 4)
    dropping.evaluate(writer, writer.test)

    again = delta_after(dropping, writer, 2, 5)
    elsewhere = delta_after(make(dropping._local, CNN(True, 0.25, 0.5)), writer, 2, 5)

    assert np.array_equal(first, again)
    assert np.array_equal(first, elsewhere)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_whether_a_kernel_was_rewritten_for_the_one_before_does_not_matter(precision: str) -> None:
    """The update of 120 rows is kept as such, that of 360 is in the kernel."""
    local = replace(SLOW, epochs=6)
    training, writers = make(local, HUGE, precision=precision), [a_writer(20), a_writer(60)]
    alone = [delta_after(make(local, HUGE, precision=precision), each, 1, 0) for each in writers]

    for place in (0, 1, 0, 0, 1, 1):
        assert np.array_equal(delta_after(training, writers[place], 1, 0), alone[place])
        (kernel,) = training._deferred
        assert (kernel.update is None) == (place == 1)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_update_that_is_kept_is_the_kernel_less_the_first(precision: str) -> None:
    """A strategy that asks for the weights has the kernel rewritten."""
    writer, start = a_writer(45), flatten(make(model=WIDE).initial_weights)
    update = delta_after(make(model=WIDE, precision=precision), writer, 1, 0)
    asks = make(model=WIDE, strategy=LocalOnly(), precision=precision)
    asks.load_memory(None)
    asks.train(writer, 1, 0)

    np.testing.assert_allclose(
        update, np.concatenate(asks.memory()) - start, rtol=0, atol=float(np.spacing(start.max()))
    )
    assert np.abs(update).max() > 1e-3


@pytest.mark.parametrize(("round", "client"), [(3, 5), (2, 6), (5, 2)])
def test_round_and_client_matter(dropping: LocalTraining, round: int, client: int) -> None:
    writer = a_writer(21)

    assert not np.array_equal(
        delta_after(dropping, writer, 2, 5), delta_after(dropping, writer, round, client)
    )


def test_dropout_is_drawn_anew_for_every_client(dropping: LocalTraining) -> None:
    """One image is one batch in any order: only the dropout can tell the clients apart."""
    writer = a_writer(1)

    assert not np.array_equal(
        delta_after(dropping, writer, 2, 5), delta_after(dropping, writer, 2, 6)
    )
    without = make(model=CNN(True, 0.0, 0.0))
    assert np.array_equal(delta_after(without, writer, 2, 5), delta_after(without, writer, 2, 6))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", [TWO_LAYERS, CNN(True, 0.0, 0.0), HUGE])
def test_loaded_weights_are_where_training_begins(model: Model, precision: str) -> None:
    training, writer = make(SLOW, model, precision=precision), a_writer(21)
    initial = flatten(training.initial_weights)
    first = delta_after(training, writer, 1, 0)

    training.load(initial + first)
    second = delta_after(training, writer, 1, 0)
    training.load(initial)

    assert not np.array_equal(first, second)
    assert np.array_equal(first, delta_after(training, writer, 1, 0))
    elsewhere = make(SLOW, model, precision=precision)
    elsewhere.load(initial + first)
    assert np.array_equal(second, delta_after(elsewhere, writer, 1, 0))


@pytest.mark.parametrize("strategy", [FedAvg(), Ditto(0.1)], ids=["fedavg", "ditto"])
@pytest.mark.parametrize("model", [CNN(True, 0.25, 0.5), HUGE], ids=["cnn", "huge"])
def test_weights_that_are_lent_stay_as_they_are(model: Model, strategy: Strategy) -> None:
    """They lie where the driver writes the next ones, and every worker reads them there."""
    writer = a_writer(45, held_out=5)

    def updates(lend: bool) -> list[np.ndarray]:
        training, found = make(SLOW, model, strategy), []
        initial = flatten(training.initial_weights)
        pages = np.frombuffer(mmap.mmap(-1, initial.nbytes), np.float32)
        training.load_memory(None)
        for step in (0, 1e-3):
            pages[:] = initial + np.float32(step)
            training.load(pages if lend else pages.copy())
            found.append(delta_after(training, writer, 1, 0))
            training.evaluate(writer, writer.test)
            found.append(delta_after(training, writer, 2, 0))
            largest = max(training._global_weights, key=lambda weight: weight.shape.num_elements())
            assert np.shares_memory(_view(largest), pages) is lend
            assert np.array_equal(pages, initial + np.float32(step))
        return found

    assert all(np.array_equal(*both) for both in zip(updates(True), updates(False), strict=True))


def test_weights_that_must_not_be_written_to_are_copied() -> None:
    training, writer = make(), a_writer(21)
    expected = delta_after(training, writer, 1, 0)
    weights = np.frombuffer(mmap.mmap(-1, 4 * training.parameters), np.float32)
    weights[:] = flatten(training.initial_weights)
    weights.flags.writeable = False

    training.load(weights)

    assert np.array_equal(delta_after(training, writer, 1, 0), expected)
    assert not any(np.shares_memory(_view(w), weights) for w in training._global_weights)


@pytest.mark.parametrize("model", [TWO_LAYERS, WIDE])
def test_what_a_client_remembers_is_where_training_of_its_own_begins(model: Model) -> None:
    training, writer = make(model=model, strategy=LocalOnly()), a_writer(21)
    training.load_memory(None)
    training.train(writer, 1, 0)
    remembered = np.concatenate(training.memory())

    training.load_memory(remembered)
    training.train(writer, 2, 0)
    elsewhere = make(model=model, strategy=LocalOnly())
    elsewhere.load_memory(remembered)
    elsewhere.train(writer, 2, 0)

    assert np.array_equal(np.concatenate(training.memory()), np.concatenate(elsewhere.memory()))
    assert not np.array_equal(np.concatenate(training.memory()), remembered)


# evaluation


@pytest.mark.parametrize(
    ("spec", "examples"),
    [
        (LOGISTIC, 1),
        (LOGISTIC, 20),
        (LOGISTIC, 1100),  # two batches of 512 and one of 76
        (CNN(True, 0.25, 0.5), 20),
    ],
)
def test_evaluation_equals_keras(spec: Model, examples: int) -> None:
    training, writer = make(model=spec), a_writer(2, held_out=examples)
    weights = np.random.default_rng(0).normal(0, 0.1, training.parameters).astype(np.float32)
    training.load(weights)
    training.train(writer, 1, 0)  # leaves weights that are not to be evaluated

    outcome = training.evaluate(writer, writer.test)

    model = spec.build(SEED)
    model.set_weights(unflatten(weights, training.shapes))
    logits = model.predict(pixels(writer, writer.test), verbose=0).astype(np.float64)
    labels = writer.labels[writer.test]
    highest = logits.max(axis=1)
    log_sum = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1))
    assert outcome.examples == examples
    assert outcome.correct == (logits.argmax(axis=1) == labels).sum()
    assert outcome.loss_sum == pytest.approx(
        (log_sum - logits[np.arange(examples), labels]).sum(), rel=1e-5
    )


def test_evaluating_nothing_comes_to_nothing() -> None:
    outcome = make().evaluate(a_writer(3), np.empty(0, np.int32))

    assert (outcome.examples, outcome.loss_sum, outcome.correct) == (0, 0.0, 0)


# what a client came to, and sums of it


def test_delta_is_local_minus_global() -> None:
    training = make()

    vector = delta_after(training, a_writer(21), 1, 0)

    local = flatten(training.model.get_weights())
    assert np.array_equal(vector, local - flatten(LOGISTIC.build(SEED).get_weights()))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_the_order_of_clients_does_not_matter(order: tuple[int, ...]) -> None:
    training = make()
    writers = [a_writer(examples) for examples in (60, 1, 21)]
    totals = []

    for clients in ((0, 1, 2), order):
        total = np.full(training.parameters, np.nan)  # what `first` overwrites
        for place, client in enumerate(clients):
            outcome = training.train(writers[client], 1, client)
            training.fold(outcome.examples, total, first=place == 0)
        totals.append(total)

    assert np.array_equal(*totals)
    deltas = [delta_after(training, writer, 1, i) for i, writer in enumerate(writers)]
    exact = sum(n * d.astype(np.float64) for n, d in zip((60, 1, 21), deltas, strict=True))
    np.testing.assert_allclose(totals[0], exact, atol=3 * 2.0**-31, rtol=0)  # rounded three times
    assert np.array_equal(totals[0] * 2.0**30, np.rint(totals[0] * 2.0**30))


def test_sums_of_parts_are_the_sum() -> None:
    """Two workers' sums added give the bits that one worker gets."""
    training = make()
    writers = [a_writer(examples) for examples in (60, 1, 21)]

    def fold(*clients: int) -> np.ndarray:
        total = np.empty(training.parameters)
        for place, client in enumerate(clients):
            training.train(writers[client], 1, client)
            training.fold(len(writers[client].train), total, first=place == 0)
        return total

    assert np.array_equal(fold(0, 1, 2), fold(2) + fold(1, 0))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", [LOGISTIC, HUGE], ids=["logistic", "huge"])
def test_a_term_of_a_sum_is_rounded_once_to_the_grid(model: Model, precision: str) -> None:
    """Also where the kernel's update itself is kept, in half precision, and for odd weights."""
    training = make(model=model, precision=precision)
    delta = delta_after(training, a_writer(45), 1, 0).astype(np.float64)
    assert any(update is not None for update in training._updates()) is (model is HUGE)
    total = np.empty(training.parameters)

    for weight in (1 / 3, 45.0):
        training.fold(weight, total, first=weight < 1)

    expected = sum(np.rint(weight * delta * 2.0**30) for weight in (1 / 3, 45.0)) / 2.0**30
    assert np.array_equal(total, expected)


# divergence


def fold(training: LocalTraining) -> None:
    training.fold(20, np.zeros(training.parameters), first=True)


def delta(training: LocalTraining) -> None:
    training.delta(np.empty(training.parameters, np.float32))


def test_a_loss_that_is_no_number_is_an_error() -> None:
    training = make(replace(PLAIN, learning_rate=1e30), TWO_LAYERS)

    with pytest.raises(DivergedError, match=r"training loss is (nan|inf)"):
        training.train(a_writer(60), 1, 0)


@pytest.mark.parametrize("take", [fold, delta])
def test_a_weight_that_is_no_number_is_an_error(take: Callable[[LocalTraining], None]) -> None:
    """One step: its loss is still finite, the weights after it are not."""
    training = make(replace(PLAIN, learning_rate=float("inf")))
    training.train(a_writer(20), 1, 0)

    with pytest.raises(DivergedError, match="the update"):
        take(training)


def test_a_number_beyond_the_exact_sums_is_an_error() -> None:
    training = make(replace(PLAIN, learning_rate=1e9))
    training.train(a_writer(20), 1, 0)

    with pytest.raises(DivergedError, match=r"reaches .*; expected less than 2097152"):
        fold(training)


def test_training_goes_on_after_a_divergence() -> None:
    training = make()
    expected = delta_after(training, a_writer(20), 1, 0)
    training.load(np.full(training.parameters, np.nan, np.float32))
    with pytest.raises(DivergedError):
        training.train(a_writer(20), 1, 0)

    training.load(flatten(LOGISTIC.build(SEED).get_weights()))

    assert np.array_equal(delta_after(training, a_writer(20), 1, 0), expected)


# vectors and layers


@pytest.mark.parametrize("shape", [(0,), (7,), (100_003,), (3, 5, 2)])
def test_numbers_are_finite_however_large(shape: tuple[int, ...]) -> None:
    for number in (0, 1, -3e38, 1e-45):
        assert is_finite(np.full(shape, number, np.float32))


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_one_number_that_is_not_finite_is_seen(number: float) -> None:
    for value, at in itertools.product((0, 1, -3e38), (0, 50_000, 100_002)):
        array = np.full(100_003, value, np.float32)
        array[at] = number
        assert not is_finite(array)
    assert not is_finite(np.float32([[1, 2], [number, 3]]))


def test_a_vector_and_its_layers() -> None:
    layers = [np.arange(6, dtype=np.float32).reshape(2, 3), np.float32([6, 7])]

    vector = flatten(layers)
    views = unflatten(vector, [(2, 3), (2,)])

    assert vector.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert all(np.array_equal(a, b) for a, b in zip(views, layers, strict=True))
    assert all(np.shares_memory(view, vector) for view in views)
    with pytest.raises(ValueError, match="8 weights; expected 9"):
        unflatten(vector, [(3, 3)])


def test_no_gpu_is_seen_that_nobody_asked_for() -> None:
    assert tf.config.get_visible_devices("GPU") == []

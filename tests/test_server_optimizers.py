"""Server optimizers and server-side rules against papers, Keras and Flower."""

import dataclasses
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import strategy as legacy
from flwr.serverapp import strategy as flower

from femfed import UserError, config
from femfed.strategies.base import Cohort, Outcome, State, Strategy, Update, Weights
from femfed.strategies.fault_tolerant_fedavg import FaultTolerantFedAvg
from femfed.strategies.fedadagrad import FedAdagrad
from femfed.strategies.fedadam import FedAdam
from femfed.strategies.fedavg import FedAvg
from femfed.strategies.fedavgm import FedAvgM
from femfed.strategies.fedexp import FedExP
from femfed.strategies.fedopt import FedOpt
from femfed.strategies.fedyogi import FedYogi
from femfed.strategies.qfedavg import QFedAvg

ROUNDS = 5
SHAPES = ((3, 2), (4,), (2, 2, 1, 3))
TOLERANCE = 1e-6

Float64s = list[np.ndarray[Any, np.dtype[np.float64]]]


def some_weights(seed: int, scale: float = 0.1) -> Weights:
    draw = np.random.default_rng(seed)
    return [draw.normal(0, scale, shape).astype(np.float32) for shape in SHAPES]


def update_of(client: int, delta: Weights, examples: int, loss: float) -> Update:
    norm = float(sum((layer.astype(np.float64) ** 2).sum() for layer in delta))
    return Update(
        examples, 0.0, 0, steps=1.0, loss_before=loss, squared_norm=norm, client=client, delta=delta
    )


def some_updates(number: int, clients: int = 4) -> list[Update]:
    """Updates of a round that share a direction and differ in examples, losses and lengths."""
    draw = np.random.default_rng(1000 + number)
    common = some_weights(2000 + number)
    return [
        update_of(
            client,
            [c + own for c, own in zip(common, some_weights(10 * number + client), strict=True)],
            examples=int(draw.integers(10, 300)),
            loss=float(draw.uniform(0.2, 4.0)),
        )
        for client in range(clients)
    ]


def cohort_of(strategy: Strategy, updates: Sequence[Update], drawn: int | None = None) -> Cohort:
    return Cohort(
        outcomes=updates,
        drawn=len(updates) if drawn is None else drawn,
        clients=40,
        most_steps=1.0,
        weight_sum=sum(strategy.weight(update, 1.0) for update in updates),
        extra=[],
    )


def one_round(
    strategy: Strategy, weights: Weights, updates: Sequence[Update], state: State
) -> tuple[Weights, State]:
    delta = strategy.aggregate(updates)
    return strategy.apply(weights, delta, state, cohort_of(strategy, updates))


def scattered_updates(number: int) -> list[Update]:
    """Updates of a round that share no direction: their mean is short."""
    return [
        update_of(client, some_weights(5000 + 10 * number + client), 20 + 30 * client, loss=1.0)
        for client in range(4)
    ]


def run(
    strategy: Strategy,
    rounds: int = ROUNDS,
    updates_of: Callable[[int], list[Update]] = some_updates,
) -> list[Weights]:
    """Return the weights after every round."""
    weights = some_weights(0)
    state, history = strategy.init(weights), []
    for number in range(1, rounds + 1):
        weights, state = one_round(strategy, weights, updates_of(number), state)
        history.append(weights)
    return history


def mean64(updates: Sequence[Update], shares: Sequence[float]) -> Float64s:
    layers = zip(*(update.delta for update in updates), strict=True)
    return [
        sum(s * layer.astype(np.float64) for s, layer in zip(shares, each, strict=True))
        / sum(shares)
        for each in layers
    ]


def by_examples(number: int) -> Float64s:
    updates = some_updates(number)
    return mean64(updates, [update.examples for update in updates])


def same(ours: Weights, theirs: Weights) -> bool:
    return all(
        a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in zip(ours, theirs, strict=True)
    )


def assert_agree(ours: list[Weights], theirs: list[Float64s]) -> None:
    assert len(ours) == len(theirs) == ROUNDS
    for a, b in zip(ours, theirs, strict=True):
        for mine, other in zip(a, b, strict=True):
            assert mine.dtype == np.float32
            np.testing.assert_allclose(mine, other, atol=TOLERANCE, rtol=0)


def differ(ours: list[Weights], theirs: list[Float64s]) -> bool:
    return any(
        np.abs(mine - other).max() > 10 * TOLERANCE
        for a, b in zip(ours, theirs, strict=True)
        for mine, other in zip(a, b, strict=True)
    )


# Keras: the mean update is the negative gradient.


def with_keras(optimizer: keras.optimizers.Optimizer) -> list[Float64s]:
    variables = [keras.Variable(w, dtype="float64") for w in some_weights(0)]
    history = []
    for number in range(1, ROUNDS + 1):
        gradients = [keras.ops.convert_to_tensor(-d) for d in by_examples(number)]
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
        history.append([np.array(variable) for variable in variables])
    return history


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_sgd_is_keras_sgd(rate: float, momentum: float, nesterov: bool) -> None:
    theirs = with_keras(keras.optimizers.SGD(rate, momentum=momentum, nesterov=nesterov))

    assert_agree(run(FedOpt(rate, momentum, 0.0, nesterov)), theirs)
    assert_agree(run(FedAvgM(rate, momentum, nesterov)), theirs)


@pytest.mark.parametrize("beta_2", [0.99, 0.999])
def test_fedadam_with_bias_correction_is_keras_adam(beta_2: float) -> None:
    theirs = with_keras(keras.optimizers.Adam(0.01, beta_1=0.9, beta_2=beta_2, epsilon=1e-3))
    ours = FedAdam(0.01, 0.9, beta_2, 1e-3, True, 0.0, False)

    assert_agree(run(ours), theirs)
    if beta_2 != 0.99:  # sqrt(1 - 0.99) = 1 - 0.9: the first round would be the same
        assert differ(run(dataclasses.replace(ours, bias_correction=False), 1), theirs[:1])


@pytest.mark.parametrize("start", [0.0, 0.1])
def test_fedadagrad_inside_the_root_is_keras_adagrad(start: float) -> None:
    theirs = with_keras(
        keras.optimizers.Adagrad(0.1, initial_accumulator_value=start, epsilon=0.01)
    )
    ours = FedAdagrad(0.1, 0.0, 0.01, start, True)

    assert_agree(run(ours), theirs)
    assert differ(run(dataclasses.replace(ours, tau_inside_root=False)), theirs)


# Flower


def with_flower(
    strategy: Any, remember: Callable[[Any, ArrayRecord], None], first_round: int = 1
) -> list[Float64s]:
    """Run Flower's strategy in float64 on the same updates, added to its own weights."""
    arrays = record([w.astype(np.float64) for w in some_weights(0)])
    history = []
    for number in range(1, ROUNDS + 1):
        origin = arrays.to_numpy_ndarrays()
        remember(strategy, arrays)
        replies = [
            reply([w + d for w, d in zip(origin, update.delta, strict=True)], update)
            for update in some_updates(number)
        ]
        arrays, _ = strategy.aggregate_train(first_round + number - 1, replies)
        history.append(arrays.to_numpy_ndarrays())
    return history


def record(layers: Sequence[Any]) -> ArrayRecord:
    return ArrayRecord({str(i): Array(layer) for i, layer in enumerate(layers)})


def reply(layers: Sequence[Any], update: Update) -> Any:
    """Return what a strategy reads of a message; Flower makes real ones inside a run only."""
    metrics = MetricRecord({"num-examples": update.examples, "train_loss": update.loss_before})
    content = RecordDict({"arrays": record(layers), "metrics": metrics})
    return SimpleNamespace(content=content, has_error=lambda: False)


def remember_arrays(strategy: Any, arrays: ArrayRecord) -> None:
    """Do what `configure_train` does, without a grid."""
    strategy.current_arrays = arrays


def remember_layers(strategy: Any, arrays: ArrayRecord) -> None:
    strategy.current_arrays = {name: array.numpy() for name, array in arrays.items()}


def test_fedavgm_is_flowers() -> None:
    theirs = with_flower(
        flower.FedAvgM(server_learning_rate=0.3, server_momentum=0.9), remember_arrays
    )

    assert_agree(run(FedAvgM(0.3, 0.9, False)), theirs)


def test_fedadam_is_flowers_had_its_rounds_counted_from_nought() -> None:
    def flowers(first_round: int) -> list[Float64s]:
        made = flower.FedAdam(eta=0.01, beta_1=0.9, beta_2=0.999, tau=1e-3)
        return with_flower(made, remember_layers, first_round)

    ours = run(FedAdam(0.01, 0.9, 0.999, 1e-3, True, 0.0, False))

    assert_agree(ours, flowers(0))
    assert differ(ours, flowers(1))


@pytest.mark.parametrize("tau", [1e-3, 1e-2])
def test_fedadagrad_is_flowers(tau: float) -> None:
    theirs = with_flower(flower.FedAdagrad(eta=0.1, tau=tau), remember_layers)

    assert_agree(run(FedAdagrad(0.1, 0.0, tau, 0.0, False)), theirs)


def test_fedyogi_without_bias_correction_is_flowers() -> None:
    theirs = with_flower(
        flower.FedYogi(eta=0.01, beta_1=0.9, beta_2=0.99, tau=1e-3), remember_layers
    )

    assert_agree(run(FedYogi(0.01, 0.9, 0.99, 1e-3, False, 0.0, False)), theirs)


@pytest.mark.parametrize("q", [0.0, 0.1, 1.0, 5.0])
def test_qfedavg_is_flowers(q: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gc.collect", lambda: 0)  # Flower's collects garbage at every reply
    theirs = with_flower(flower.QFedAvg(client_learning_rate=0.1, q=q), remember_arrays)

    assert_agree(run(QFedAvg(q, 0.1, "uniform")), theirs)


@pytest.mark.parametrize("rate", [0.0, 0.25, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("completed", [1, 3, 5, 7, 9, 10])
def test_a_round_counts_where_flowers_does(completed: int, rate: float) -> None:
    strategy, weights = FaultTolerantFedAvg(rate), some_weights(0)
    updates = some_updates(1, completed)
    results = [
        (
            None,
            FitRes(
                Status(Code.OK, ""),
                ndarrays_to_parameters(
                    [w + d.astype(np.float64) for w, d in zip(weights, u.delta, strict=True)]
                ),
                u.examples,
                {},
            ),
        )
        for u in updates
    ]
    theirs = legacy.FaultTolerantFedAvg(
        min_completion_rate_fit=rate, fit_metrics_aggregation_fn=lambda _: {}
    )
    failures = [RuntimeError("gone")] * (10 - completed)
    parameters, _ = theirs.aggregate_fit(1, results, failures)  # type: ignore[arg-type]

    delta, cohort = strategy.aggregate(updates), cohort_of(strategy, updates, drawn=10)
    ours, state = strategy.apply(weights, delta, {}, cohort)

    assert state == {}
    assert (parameters is None) == same(ours, weights)
    if parameters is not None:
        for a, b in zip(ours, parameters_to_ndarrays(parameters), strict=True):
            np.testing.assert_allclose(a, b, atol=TOLERANCE, rtol=0)


# The papers, in float64


def by_paper(step: Callable[[Float64s, int], Float64s]) -> list[Float64s]:
    """Return the weights after every round where `step(mean update, round)` is added to them."""
    weights = [w.astype(np.float64) for w in some_weights(0)]
    history = []
    for number in range(1, ROUNDS + 1):
        steps = step(by_examples(number), number)
        weights = [w + s for w, s in zip(weights, steps, strict=True)]
        history.append(weights)
    return history


def second_moment(rule: str, v: Any, d: Any, beta_2: float) -> Any:
    if rule == "adagrad":
        return v + d**2
    if rule == "adam":
        return beta_2 * v + (1 - beta_2) * d**2
    # yogi, by cases rather than by sign: up where the square is larger, down where it is smaller
    return np.where(d**2 > v, v + (1 - beta_2) * d**2, v - (1 - beta_2) * d**2)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("start", [0.0, 1e-6, 0.04])
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("rule", ["adagrad", "adam", "yogi"])
def test_adaptive_servers_follow_the_paper(
    rule: str, corrected: bool, start: float, inside: bool
) -> None:
    rate, beta_1, beta_2, tau = 0.02, 0.8, 0.95, 1e-3
    m = [np.zeros(shape) for shape in SHAPES]
    v = [np.full(shape, start) for shape in SHAPES]

    def step(delta: Float64s, number: int) -> Float64s:
        steps = []
        for i, d in enumerate(delta):
            m[i] = beta_1 * m[i] + (1 - beta_1) * d
            v[i] = second_moment(rule, v[i], d, beta_2)
            factor = rate
            if corrected and rule != "adagrad":
                factor *= np.sqrt(1 - beta_2**number) / (1 - beta_1**number)
            steps.append(factor * m[i] / ((v[i] + tau) ** 0.5 if inside else v[i] ** 0.5 + tau))
        return steps

    ours: Strategy = FedAdagrad(rate, beta_1, tau, start, inside)
    if rule != "adagrad":
        kind = FedAdam if rule == "adam" else FedYogi
        ours = kind(rate, beta_1, beta_2, tau, corrected, start, inside)

    assert_agree(run(ours), by_paper(step))


@pytest.mark.parametrize("dampening", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
def test_a_dampened_velocity(nesterov: bool, dampening: float) -> None:
    rate, momentum = 0.3, 0.9
    v = [np.zeros(shape) for shape in SHAPES]

    def step(delta: Float64s, number: int) -> Float64s:
        g = [(1 - dampening) * d for d in delta]
        v[:] = [momentum * old + new for old, new in zip(v, g, strict=True)]
        ahead = [momentum * each + new for each, new in zip(v, g, strict=True)]
        return [rate * each for each in (ahead if nesterov else v)]

    assert_agree(run(FedOpt(rate, momentum, dampening, nesterov)), by_paper(step))


def test_a_dampened_velocity_is_adams_first_moment() -> None:
    sgd, adam = FedOpt(1.0, 0.9, 0.9, False), FedAdam(0.1, 0.9, 0.99, 0.1, False, 0.0, False)
    weights, state, other = some_weights(0), sgd.init(some_weights(0)), adam.init(some_weights(0))
    for number in range(1, ROUNDS + 1):
        updates = some_updates(number)
        _, state = one_round(sgd, weights, updates, state)
        _, other = one_round(adam, weights, updates, other)

        for a, b in zip(state["velocity"], other["first_moment"], strict=True):
            np.testing.assert_allclose(a, b, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
@pytest.mark.parametrize("epsilon", [0.0, 0.001, 0.01, 1.0])
def test_fedexp_follows_the_paper(epsilon: float, weighting: str) -> None:
    weights, longest = [w.astype(np.float64) for w in some_weights(0)], 0.0
    theirs = []
    for number in range(1, ROUNDS + 1):
        updates = scattered_updates(number)
        shares = [1.0 if weighting == "uniform" else u.examples for u in updates]
        mean = mean64(updates, shares)
        norms = [sum(np.linalg.norm(layer.ravel()) ** 2 for layer in u.delta) for u in updates]
        mean_norm = sum(s * n for s, n in zip(shares, norms, strict=True)) / sum(shares)
        norm_mean = np.linalg.norm(np.concatenate([layer.ravel() for layer in mean])) ** 2
        step = max(1, mean_norm / (2 * (norm_mean + epsilon)))
        longest = max(longest, step)
        weights = [w + step * d for w, d in zip(weights, mean, strict=True)]
        theirs.append(weights)

    assert_agree(run(FedExP(epsilon, weighting), updates_of=scattered_updates), theirs)
    assert (longest > 1) == (epsilon < 1)


def opposed(number: int) -> list[Update]:
    """Two updates that nearly cancel: the mean is short and the step long."""
    one, two = some_weights(3000 + number), some_weights(4000 + number, 0.01)
    deltas = [one, [b - a for a, b in zip(one, two, strict=True)]]
    return [update_of(i, delta, 20 + 80 * i, 1.0) for i, delta in enumerate(deltas)]


def test_fedexp_steps_far_where_updates_cancel() -> None:
    updates = opposed(1)
    mean = mean64(updates, [1, 1])
    expected = sum(u.squared_norm for u in updates) / 4 / sum((d**2).sum() for d in mean)

    moved, _ = one_round(FedExP(0.0, "uniform"), some_weights(0), updates, {})

    assert expected > 10
    for w, origin, d in zip(moved, some_weights(0), mean, strict=True):
        np.testing.assert_allclose(w, origin + expected * d, atol=TOLERANCE, rtol=1e-5)


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
@pytest.mark.parametrize("q", [0.0, 0.1, 1.0, 2.0, 5.0])
def test_qfedavg_follows_the_paper(q: float, weighting: str) -> None:
    weights, rate = [w.astype(np.float64) for w in some_weights(0)], 0.05
    smooth, theirs = 1 / rate, []
    for number in range(1, ROUNDS + 1):
        top, bottom = [np.zeros(shape) for shape in SHAPES], 0.0
        for update in some_updates(number):
            p = 1.0 if weighting == "uniform" else update.examples / 1000
            loss = update.loss_before
            g = [-smooth * layer.astype(np.float64) for layer in update.delta]
            top = [t + p * loss**q * layer for t, layer in zip(top, g, strict=True)]
            norm = sum((layer**2).sum() for layer in g)
            bottom += p * (q * loss ** (q - 1) * norm + smooth * loss**q)
        weights = [w - t / bottom for w, t in zip(weights, top, strict=True)]
        theirs.append(weights)

    assert_agree(run(QFedAvg(q, rate, weighting)), theirs)


# What is FedAvg, bit for bit


@pytest.mark.parametrize(
    "strategy",
    [
        FedAvgM(1.0, 0.0, False),
        FedAvgM(1.0, 0.0, True),
        FedOpt(1.0, 0.0, 0.0, False),
        FedExP(1e6, "examples"),
        QFedAvg(0.0, 0.1, "examples"),
        FaultTolerantFedAvg(0.0),
        FaultTolerantFedAvg(1.0),
    ],
    ids=repr,
)
def test_special_cases_are_fedavg(strategy: Strategy) -> None:
    pairs = zip(run(strategy), run(FedAvg()), strict=True)

    assert all(same(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize("strategy", [FedExP(1e6, "uniform"), QFedAvg(0.0, 0.1, "uniform")])
def test_clients_that_count_alike(strategy: Strategy) -> None:
    @dataclasses.dataclass(frozen=True)
    class Alike(Strategy):
        def weight(self, outcome: Outcome, most_steps: float) -> float:
            return 256.0

    pairs = zip(run(strategy), run(Alike()), strict=True)

    assert all(same(ours, theirs) for ours, theirs in pairs)
    assert not same(run(strategy)[0], run(FedAvg())[0])


def test_fedexp_of_equal_updates_is_fedavg() -> None:
    updates = [dataclasses.replace(some_updates(1)[0], client=i) for i in range(3)]
    weights = some_weights(0)

    ours, _ = one_round(FedExP(0.0, "examples"), weights, updates, {})
    theirs, _ = one_round(FedAvg(), weights, updates, {})

    assert same(ours, theirs)


# Numbers typed by hand


def rounds_by_hand(strategy: Strategy, *deltas: float, start: float = 1.0) -> list[float]:
    """Return one weight after every round of one client."""
    weights = [np.float32([start])]
    state, history = strategy.init(weights), []
    for d in deltas:
        updates = [update_of(0, [np.float32([d])], 1, 2.0)]
        weights, state = one_round(strategy, weights, updates, state)
        history.append(float(weights[0][0]))
    return history


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        # v = 1, 0.5 + 2 = 2.5; w = 1 + 0.5 * 1 = 1.5, 1.5 + 0.5 * 2.5 = 2.75
        (FedAvgM(0.5, 0.5, False), [1.5, 2.75]),
        # 0.5 * 1 + 1 = 1.5, 0.5 * 2.5 + 2 = 3.25; w = 1 + 0.75, 1.75 + 1.625
        (FedAvgM(0.5, 0.5, True), [1.75, 3.375]),
        # v = 0.5, 0.25 + 1 = 1.25
        (FedOpt(0.5, 0.5, 0.0, False), [1.5, 2.75]),
        # steps 0.25 * 1, 0.25 * 2; v = 0.25, 0.125 + 0.5 = 0.625
        (FedOpt(0.5, 0.5, 0.5, False), [1.25, 1.875]),
        # v = 1, 5; w = 1 + 1 / (1 + 1), 1.5 + 2 / (sqrt 5 + 1) = 1.5 + 0.618034
        (FedAdagrad(1.0, 0.0, 1.0, 0.0, False), [1.5, 2.118034]),
        # v = 4, 8: 1 + 1 / sqrt(4 + 5), 1 / 3 + 2 / sqrt(8 + 5)
        (FedAdagrad(1.0, 0.0, 5.0, 3.0, True), [1.333333, 1.888033]),
        # m = 0.5, 1.25; v = 0.25, 0.1875 + 1 = 1.1875; 0.5 / (0.5 + 0.5), 1.25 / (1.089725 + 0.5)
        (FedAdam(1.0, 0.5, 0.75, 0.5, False, 0.0, False), [1.5, 2.286300]),
        # times sqrt(0.25) / 0.5 = 1, sqrt(0.4375) / 0.75 = 0.881917
        (FedAdam(1.0, 0.5, 0.75, 0.5, True, 0.0, False), [1.5, 2.193451]),
        # v = 0.25, and 0.25 < 4: 0.25 + 1 = 1.25; 1.25 / (1.118034 + 0.5)
        (FedYogi(1.0, 0.5, 0.75, 0.5, False, 0.0, False), [1.5, 2.272542]),
        # 9 > 1: v = 8.75, 8.75 > 4: v = 7.75; 0.5 / (2.958040 + 0.5), 1.25 / (2.783882 + 0.5)
        (FedYogi(1.0, 0.5, 0.75, 0.5, False, 9.0, False), [1.144591, 1.525238]),
        # 4 / (2 * 4) = 0.5, below 1
        (FedExP(0.0, "uniform"), [2.0, 4.0]),
        # F = 2, L = 2, q = 1: step F / (||L d||^2 + L F) * L = 4 / (4 + 4), 4 / (16 + 4)
        (QFedAvg(1.0, 0.5, "uniform"), [1.5, 1.9]),
    ],
    ids=repr,
)
def test_two_rounds_by_hand(strategy: Strategy, expected: list[float]) -> None:
    assert rounds_by_hand(strategy, 1.0, 2.0) == pytest.approx(expected, abs=TOLERANCE)


def test_fedexp_by_hand() -> None:
    # mean (3 - 1) / 2 = 1; step (9 + 1) / 2 / (2 * (1 + 0.25)) = 2
    updates = [update_of(0, [np.float32([3.0])], 10, 0.0), update_of(1, [np.float32([-1.0])], 5, 0)]

    moved, _ = one_round(FedExP(0.25, "uniform"), [np.float32([0.0])], updates, {})

    assert moved[0][0] == 2.0


def test_fedexp_weighted_by_hand() -> None:
    # mean (3 * 3 - 5) / 4 = 1; step (3 * 9 + 25) / 4 / (2 * (1 + 0.3)) = 13 / 2.6
    updates = [update_of(0, [np.float32([3.0])], 3, 0.0), update_of(1, [np.float32([-5.0])], 1, 0)]

    moved, _ = one_round(FedExP(0.3, "examples"), [np.float32([0.0])], updates, {})

    assert moved[0][0] == pytest.approx(5.0, abs=TOLERANCE)


def test_fedexp_without_epsilon_stays_where_updates_cancel() -> None:
    updates = [update_of(i, [np.float32([sign])], 10, 0.0) for i, sign in enumerate((1.0, -1.0))]

    moved, _ = one_round(FedExP(0.0, "uniform"), [np.float32([0.5])], updates, {})

    assert moved[0][0] == 0.5


def test_qfedavg_listens_to_the_writer_that_is_worse_off() -> None:
    updates = [
        update_of(0, [np.float32([1.0])], 10, 4.0),
        update_of(1, [np.float32([-1.0])], 10, 1.0),
    ]

    # (16 - 1) / (16 + 1) of the way for q = 2, before the step: the mean of F^q is what is folded
    assert QFedAvg(2.0, 0.1, "uniform").aggregate(updates)[0][0] == pytest.approx(15 / 17)
    assert QFedAvg(0.0, 0.1, "uniform").aggregate(updates)[0][0] == 0.0


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
@pytest.mark.parametrize("q", [0.5, 1.0, 5.0])
def test_qfedavg_bears_a_loss_of_zero(q: float, weighting: str) -> None:
    updates = [update_of(i, some_weights(i), 10, 0.0) for i in range(2)]

    moved, _ = one_round(QFedAvg(q, 0.1, weighting), some_weights(0), updates, {})

    assert all(np.isfinite(layer).all() for layer in moved)


def test_yogi_forgets_slower_than_adam() -> None:
    def accumulator(strategy: Strategy) -> float:
        weights = [np.float32([0.0])]
        state = strategy.init(weights)
        for d in (1.0, 0.01, 0.01):
            updates = [update_of(0, [np.float32([d])], 1, 1.0)]
            weights, state = one_round(strategy, weights, updates, state)
        return float(state["accumulator"][0][0])

    options = (0.1, 0.9, 0.9, 1e-3, False, 0.0, False)

    # adam: 0.1 * 0.9^2, and as good as nothing; yogi: 0.1 - 2 * 0.1 * 0.0001
    assert accumulator(FedAdam(*options)) == pytest.approx(0.081019, abs=TOLERANCE)
    assert accumulator(FedYogi(*options)) == pytest.approx(0.09998, abs=TOLERANCE)


# What they take and keep


@pytest.mark.parametrize(
    "strategy",
    [
        FedAvgM(0.3, 0.9, True),
        FedOpt(0.3, 0.9, 0.5, True),
        FedAdagrad(0.1, 0.9, 0.01, 0.1, False),
        FedAdam(0.1, 0.9, 0.99, 1e-3, True, 0.1, True),
        FedYogi(0.1, 0.9, 0.99, 1e-3, True, 0.1, True),
        FedExP(0.1, "uniform"),
        QFedAvg(1.0, 0.1, "uniform"),
        FaultTolerantFedAvg(1.0),
    ],
    ids=lambda strategy: type(strategy).__name__,
)
@pytest.mark.parametrize("drawn", [4, 8])
def test_nothing_given_is_handed_back(strategy: Strategy, drawn: int) -> None:
    weights, updates = some_weights(0), some_updates(1)
    state, delta = strategy.init(weights), strategy.aggregate(updates)

    moved, after = strategy.apply(weights, delta, state, cohort_of(strategy, updates, drawn))

    given = [*weights, *delta, *(layer for layers in state.values() for layer in layers)]
    made = [*moved, *(layer for layers in after.values() for layer in layers)]
    assert not any(np.shares_memory(a, b) for a in given for b in made)
    assert all(layer.dtype == np.float32 for layer in made)
    assert strategy.averages


@pytest.mark.parametrize("strategy", [FedExP(0.1, "uniform"), QFedAvg(1.0, 0.1, "uniform")])
def test_an_unknown_weighting_is_refused(strategy: Strategy) -> None:
    with pytest.raises(UserError, match=r"strategy\.weighting=size; expected uniform or examples"):
        dataclasses.replace(strategy, weighting="size")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("fedavgm", "server_learning_rate", 0.0),
        ("fedavgm", "server_learning_rate", float("inf")),
        ("fedavgm", "server_momentum", 1.0),
        ("fedopt", "server_learning_rate", float("inf")),
        ("fedopt", "server_momentum", 1.0),
        ("fedopt", "dampening", 1.0),
        ("fedadagrad", "beta_1", 1.0),
        ("fedadagrad", "tau", 0.0),
        ("fedadagrad", "initial_accumulator", float("inf")),
        ("fedadam", "beta_2", 1.0),
        ("fedadam", "tau", 0.0),
        ("fedadam", "initial_accumulator", float("inf")),
        ("fedyogi", "beta_1", 1.0),
        ("fedyogi", "tau", float("inf")),
        ("fedexp", "epsilon", float("inf")),
        ("qfedavg", "fairness", float("inf")),
        ("qfedavg", "client_learning_rate", 0.0),
        ("fault_tolerant_fedavg", "min_completion_rate", 1.01),
    ],
)
def test_the_ends_of_ranges_are_refused(name: str, key: str, value: float) -> None:
    made = config.make(config.compose([f"strategy={name}"]).strategy, "strategy")

    with pytest.raises(UserError, match=rf"strategy\.{key}={value}; expected"):
        dataclasses.replace(made, **{key: value})


def test_qfedavg_takes_the_clients_learning_rate_from_the_run() -> None:
    def made(*overrides: str) -> Any:
        return config.make(config.compose(["strategy=qfedavg", *overrides]).strategy, "strategy")

    assert made("local.learning_rate=0.3").client_learning_rate == 0.3
    assert made("strategy.client_learning_rate=0.2").client_learning_rate == 0.2

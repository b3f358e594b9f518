"""Corrections of client drift: the papers' algorithms written out, and where they converge."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from femfed import UserError
from femfed.client import LocalTraining
from femfed.data.store import CLASSES, Writer
from femfed.local import Local
from femfed.models import Dense
from femfed.strategies.base import ALIKE, Cohort, Outcome, Strategy
from femfed.strategies.fedavg import FedAvg
from femfed.strategies.feddyn import FedDyn
from femfed.strategies.fednova import FedNova
from femfed.strategies.mime_lite import MimeLite
from femfed.strategies.scaffold import Scaffold
from tests.quadratic import Array, Client, Layers, bowl, draw_cohorts, least_squares, run

ROUNDS, RATE = 5, 0.1
# images, batch size, local epochs: 5 clients with 2, 3, 8, 4 and 1 local steps
SIZES = ((7, 4, 1), (11, 4, 1), (16, 4, 2), (9, 5, 2), (3, 4, 1))
EXAMPLES = [n for n, _, _ in SIZES]
COHORTS = draw_cohorts(len(SIZES), 3, ROUNDS, seed=4)


def images(client: int) -> tuple[Array, Array]:
    """Inputs with a column of ones, and targets that follow another line at every client."""
    n = SIZES[client][0]
    draw = np.random.default_rng(100 + client)
    inputs = np.hstack([draw.normal(0, 1, (n, 3)), np.ones((n, 1))])
    return inputs, inputs @ draw.normal(0, 1, 4) + draw.normal(0, 0.1, n)


def clients() -> list[Client]:
    """The same as clients with two layers: three slopes and an offset."""
    return [
        least_squares(images(i)[0][:, :3], images(i)[1], batch_size=size, epochs=epochs)
        for i, (_, size, epochs) in enumerate(SIZES)
    ]


def batches(client: int) -> list[slice]:
    """The rows of every local step of a round."""
    n, size, epochs = SIZES[client]
    return [slice(start, start + size) for _ in range(epochs) for start in range(0, n, size)]


def slope(client: int, x: Array, rows: slice = slice(None)) -> Array:
    """The gradient of a client's loss at `x`, four numbers."""
    inputs, targets = images(client)
    return inputs[rows].T @ (inputs[rows] @ x - targets[rows]) / len(targets[rows])


def flat(layers: Sequence[Array]) -> Array:
    return np.concatenate([np.ravel(layer) for layer in layers])


def start(dtype: Any = np.float64) -> Layers:
    return [np.array([0.3, -0.2, 0.1], dtype), np.array([0.5], dtype)]


def shares(cohort: Sequence[int], weighting: str) -> list[float]:
    """Weights that add up to one."""
    if weighting == "uniform":
        return [1 / len(cohort)] * len(cohort)
    return [EXAMPLES[i] / sum(EXAMPLES[j] for j in cohort) for i in cohort]


def assert_same_run(strategy: Strategy, expected: list[Array], momentum: float = 0.0) -> None:
    """Every round of `strategy` ends where the oracle's does, in both precisions."""
    for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 1e-6)):
        ours = run(
            strategy, clients(), start(dtype), ROUNDS,
            learning_rate=RATE, cohorts=COHORTS, momentum=momentum,
        )  # fmt: skip
        assert all(w.dtype == dtype for layers in ours.history for w in layers)
        for number, (mine, theirs) in enumerate(zip(ours.history[1:], expected, strict=True)):
            np.testing.assert_allclose(
                flat(mine), theirs, rtol=0, atol=tolerance, err_msg=f"round {number + 1}"
            )


# the papers, step by step


def scaffold_of_the_paper(rate: float, weighting: str) -> list[Array]:
    """Algorithm 1 of the SCAFFOLD paper, option II."""
    n, x, c = len(SIZES), flat(start()), np.zeros(4)
    c_i = [np.zeros(4) for _ in range(n)]
    history = []
    for cohort in COHORTS:
        delta_y, delta_c = [], []
        for i in cohort:
            y = x.copy()
            for rows in batches(i):
                y = y - RATE * (slope(i, y, rows) - c_i[i] + c)
            c_plus = c_i[i] - c + (x - y) / (len(batches(i)) * RATE)
            delta_y.append(y - x)
            delta_c.append(c_plus - c_i[i])
            c_i[i] = c_plus
        p = shares(cohort, weighting)
        x = x + rate * sum(q * d for q, d in zip(p, delta_y, strict=True))
        c = c + len(cohort) / n * sum(q * d for q, d in zip(p, delta_c, strict=True))
        history.append(x)
    return history


@pytest.mark.parametrize(("rate", "weighting"), [(1.0, "uniform"), (0.7, "examples")])
def test_scaffold_is_the_papers(rate: float, weighting: str) -> None:
    assert_same_run(Scaffold(rate, weighting), scaffold_of_the_paper(rate, weighting))


def fednova_of_the_paper(momentum: float, server_momentum: float) -> list[Array]:
    """Sum of gradients weighted by the vector a_i, divided by its norm; server momentum outside."""
    x, v = flat(start()), np.zeros(4)
    history = []
    for cohort in COHORTS:
        p = shares(cohort, "examples")
        direction, tau_eff = np.zeros(4), 0.0
        for share, i in zip(p, cohort, strict=True):
            y, velocity, seen = x.copy(), np.zeros(4), []
            for rows in batches(i):
                seen.append(slope(i, y, rows))
                velocity = momentum * velocity + seen[-1]
                y = y - RATE * velocity
            tau = len(seen)
            a = np.array([sum(momentum**k for k in range(tau - j)) for j in range(tau)])
            direction += share * (np.array(seen).T @ a) / a.sum()
            tau_eff += share * a.sum()
        v = server_momentum * v - tau_eff * RATE * direction
        x = x + v
        history.append(x)
    return history


@pytest.mark.parametrize(("momentum", "server_momentum"), [(0.0, 0.0), (0.9, 0.0), (0.5, 0.6)])
def test_fednova_is_the_papers(momentum: float, server_momentum: float) -> None:
    assert_same_run(
        FedNova(server_momentum), fednova_of_the_paper(momentum, server_momentum), momentum
    )


def feddyn_of_the_paper(alpha: float, weighting: str) -> list[Array]:
    """Algorithm 1 of the FedDyn paper; the local minimum is approached by the same steps."""
    m, theta, h = len(SIZES), flat(start()), np.zeros(4)
    last_gradient = [np.zeros(4) for _ in range(m)]
    history = []
    for cohort in COHORTS:
        local = []
        for k in cohort:
            theta_k = theta.copy()
            for rows in batches(k):
                # d/dw of L_k(w) - <last gradient, w> + alpha / 2 ||w - theta||^2
                bent = slope(k, theta_k, rows) - last_gradient[k] + alpha * (theta_k - theta)
                theta_k = theta_k - RATE * bent
            last_gradient[k] = last_gradient[k] - alpha * (theta_k - theta)
            local.append(theta_k)
        mean = sum(q * w for q, w in zip(shares(cohort, weighting), local, strict=True))
        h = h - alpha * len(cohort) / m * (mean - theta)
        theta = mean - h / alpha
        history.append(theta)
    return history


@pytest.mark.parametrize(("alpha", "weighting"), [(0.5, "uniform"), (0.1, "examples")])
def test_feddyn_is_the_papers(alpha: float, weighting: str) -> None:
    assert_same_run(FedDyn(alpha, weighting), feddyn_of_the_paper(alpha, weighting))


def feddyn_of_the_authors(alpha: float) -> list[Array]:
    """Their code keeps -h_i / alpha, and the server the mean of what all the clients keep."""
    m, server = len(SIZES), flat(start())
    kept = [np.zeros(4) for _ in range(m)]
    history = []
    for cohort in COHORTS:
        local = []
        for k in cohort:
            w = server.copy()
            for rows in batches(k):
                w = w - RATE * (slope(k, w, rows) + alpha * (w - server + kept[k]))
            kept[k] = kept[k] + (w - server)
            local.append(w)
        server = np.mean(local, axis=0) + np.mean(kept, axis=0)
        history.append(server)
    return history


def test_feddyn_is_the_authors_code() -> None:
    assert_same_run(FedDyn(0.5, "uniform"), feddyn_of_the_authors(0.5))


def mime_lite_of_the_paper(rate: float, beta: float, weighting: str) -> list[Array]:
    """MimeLite with SGD with momentum: the optimizer's state keeps still in a round."""
    x, m = flat(start()), np.zeros(4)
    history = []
    for cohort in COHORTS:
        moves, gradients = [], []
        for i in cohort:
            gradients.append(slope(i, x))
            y = x.copy()
            for rows in batches(i):
                y = y - RATE * ((1 - beta) * slope(i, y, rows) + beta * m)
            moves.append(y - x)
        p = shares(cohort, weighting)
        x = x + rate * sum(q * d for q, d in zip(p, moves, strict=True))
        m = (1 - beta) * sum(q * g for q, g in zip(p, gradients, strict=True)) + beta * m
        history.append(x)
    return history


@pytest.mark.parametrize(
    ("rate", "beta", "weighting"), [(1.0, 0.9, "examples"), (0.7, 0.5, "uniform")]
)
def test_mime_lite_is_the_papers(rate: float, beta: float, weighting: str) -> None:
    expected = mime_lite_of_the_paper(rate, beta, weighting)

    assert_same_run(MimeLite(rate, beta, weighting), expected)


# numbers typed by hand


def number(value: float) -> Layers:
    return [np.float32([value])]


def one(layers: Sequence[Any]) -> float:
    (layer,) = layers
    return float(layer[0])


def cohort_of(outcomes: list[Outcome], weight_sum: float, extra: float = 0.0) -> Cohort:
    return Cohort(
        outcomes,
        drawn=len(outcomes),
        clients=8,
        most_steps=max(outcome.steps for outcome in outcomes),
        weight_sum=weight_sum,
        extra=number(extra),
    )


def test_scaffold_on_one_number() -> None:
    scaffold = Scaffold(0.5, "uniform")
    memory, state = {"control": number(3.0)}, {"control": number(1.0)}

    # 10 - 3 + 1
    step = scaffold.correct_gradients(number(10.0), number(0.0), number(0.0), memory, state)
    # path 0.25: (7 - 5) / 0.25 = 8 is the mean of 3 - 1 + g, so c_i = 3 - 1 + 8, 7 more
    kept, change = scaffold.finish(number(5.0), number(7.0), memory, state, 0.25, ())
    # 2 of 8 clients: 1 + 2/8 * 4
    cohort = cohort_of([Outcome(1, 0.0, 0)] * 2, 512.0, extra=4.0)
    weights, after = scaffold.apply(number(20.0), number(-6.0), state, cohort)

    assert one(step) == 8.0
    assert (one(kept["control"]), one(change)) == (10.0, 7.0)
    assert (one(weights), one(after["control"])) == (17.0, 2.0)


def test_scaffold_keeps_a_control_variate_where_no_step_was_taken() -> None:
    memory, state = {"control": number(3.0)}, {"control": number(1.0)}

    kept, change = Scaffold(1.0, "uniform").finish(number(7), number(7), memory, state, 0.0, ())

    assert (one(kept["control"]), one(change)) == (3.0, 0.0)


def test_scaffold_divides_by_the_shortest_path() -> None:
    # one step at a rate of 1e-6, in the engine's precision
    memory, state = {"control": number(0.0)}, {"control": number(0.5)}
    path = np.float32(1e-6)

    _, change = Scaffold(1.0, "uniform").finish(number(0), number(2e-6), memory, state, path, ())

    assert one(change) == pytest.approx(1.5, rel=1e-6)


def test_fednova_on_one_number() -> None:
    # n = 1 and 3, tau = 4 and 2: weights 1 * 4/4 and 3 * 4/2, deltas 8 and 2, mean 20/7;
    # tau_eff = (1 * 4 + 3 * 2) / 4 = 2.5; 2.5 * (1/4 * 8/4 + 3/4 * 2/2) = 3.125
    fednova = FedNova(0.5)
    outcomes = [Outcome(1, 0.0, 0, steps=4.0), Outcome(3, 0.0, 0, steps=2.0)]
    cohort = cohort_of(outcomes, 7.0)
    state = fednova.init(number(0.0))

    weights, state = fednova.apply(number(1.0), number(20 / 7), state, cohort)
    further, _ = fednova.apply(weights, number(20 / 7), state, cohort)

    assert [fednova.weight(outcome, 4.0) for outcome in outcomes] == [1.0, 6.0]
    assert one(weights) == pytest.approx(4.125, rel=1e-6)
    assert one(further) == pytest.approx(4.125 + 0.5 * 3.125 + 3.125, rel=1e-6)


def test_fednova_weighs_by_examples_exactly_where_all_take_as_many_steps() -> None:
    local = Local(epochs=5, batch_size=20, learning_rate=0.1, momentum=0.9, weight_decay=0.0)
    odd = local.steps(200)  # no short binary number
    examples = range(1, 400)
    assert any(n * odd / odd != n for n in examples)

    weights = [FedNova(0.0).weight(Outcome(n, 0.0, 0, steps=odd), odd) for n in examples]

    assert weights == [float(n) for n in examples]


def test_fednova_leaves_out_who_took_no_step() -> None:
    assert FedNova(0.0).weight(Outcome(0, 0.0, 0), 4.0) == 0.0


def test_feddyn_on_one_number() -> None:
    feddyn = FedDyn(0.5, "uniform")
    memory, state = {"gradient": number(3.0)}, {"gradient": number(1.0)}

    # 10 - 3 + 0.5 * (4 - 2)
    step = feddyn.correct_gradients(number(10.0), number(4.0), number(2.0), memory, state)
    # 3 - 0.5 * (4 - 2)
    kept, extra = feddyn.finish(number(4.0), number(2.0), memory, state, 0.1, ())
    # h = 1 - 0.5 * 2/8 * 4 = 0.5; 2 + 4 - 0.5 / 0.5
    cohort = cohort_of([Outcome(1, 0.0, 0)] * 2, 512.0)
    weights, after = feddyn.apply(number(2.0), number(4.0), state, cohort)

    assert (one(step), one(kept["gradient"]), extra) == (8.0, 2.0, ())
    assert (one(weights), one(after["gradient"])) == (5.0, 0.5)


def test_mime_lite_on_one_number() -> None:
    mime = MimeLite(0.5, 0.75, "examples")
    state = {"momentum": number(4.0)}

    # 1/4 * 8 + 3/4 * 4
    step = mime.correct_gradients(number(8.0), number(0.0), number(0.0), {}, state)
    kept, extra = mime.finish(number(0.0), number(0.0), {}, state, 0.1, number(9.0))
    # 1 + 0.5 * 6; 3/4 * 4 + 1/4 * 12
    cohort = cohort_of([Outcome(1, 0.0, 0)], 1.0, extra=12.0)
    weights, after = mime.apply(number(1.0), number(6.0), state, cohort)

    assert (one(step), kept, one(extra)) == (5.0, {}, 9.0)
    assert (one(weights), one(after["momentum"])) == (4.0, 6.0)


@pytest.mark.parametrize("make", [Scaffold, FedDyn, lambda *a: MimeLite(a[0], 0.5, a[1])])
def test_clients_count_alike_or_by_their_examples(make: Callable[..., Strategy]) -> None:
    few, many = Outcome(3, 0.0, 0), Outcome(300, 0.0, 0)

    assert [make(1.0, "uniform").weight(o, 1.0) for o in (few, many)] == [ALIKE, ALIKE]
    assert [make(1.0, "examples").weight(o, 1.0) for o in (few, many)] == [3.0, 300.0]
    with pytest.raises(UserError, match=r"strategy\.weighting=steps; expected uniform or examples"):
        make(1.0, "steps")


@pytest.mark.parametrize(
    ("strategy", "name", "value"),
    [
        (Scaffold(1.0, "uniform"), "server_learning_rate", 0.0),
        (Scaffold(1.0, "uniform"), "server_learning_rate", float("inf")),
        (FedDyn(1.0, "uniform"), "regularization", 0.0),
        (FedDyn(1.0, "uniform"), "regularization", float("inf")),
        (FedNova(0.0), "server_momentum", 1.0),
        (MimeLite(1.0, 0.9, "uniform"), "beta", 1.0),
        (MimeLite(1.0, 0.9, "uniform"), "server_learning_rate", 0.0),
    ],
)
def test_the_edge_of_a_range_is_refused(strategy: Strategy, name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"strategy\.{name}={value}; expected"):
        replace(strategy, **{name: value})


# what equals FedAvg, bit for bit


def history(strategy: Strategy, dtype: Any, rounds: int = ROUNDS, **more: Any) -> list[Array]:
    done = run(strategy, more.pop("of", clients()), start(dtype), rounds, learning_rate=RATE)
    return [flat(layers) for layers in done.history]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_equals_fedavg(dtype: Any) -> None:
    average = history(FedAvg(), dtype)

    first = history(Scaffold(1.0, "examples"), dtype)
    mime = history(MimeLite(1.0, 0.0, "examples"), dtype)

    assert np.array_equal(first[1], average[1])
    assert not np.array_equal(first[2], average[2])
    assert np.array_equal(mime, average)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fednova_is_fedavg_where_all_take_as_many_steps(dtype: Any, momentum: float) -> None:
    equal = [replace(client, batches=1, epochs=3) for client in clients()]
    more: dict[str, Any] = {"learning_rate": RATE, "momentum": momentum}

    nova = run(FedNova(0.0), equal, start(dtype), ROUNDS, **more)
    average = run(FedAvg(), equal, start(dtype), ROUNDS, **more)

    assert all(
        np.array_equal(flat(a), flat(b)) for a, b in zip(nova.history, average.history, strict=True)
    )
    assert not np.array_equal(history(FedNova(0.0), dtype)[1], history(FedAvg(), dtype)[1])


# what holds at all times


@pytest.mark.parametrize(
    ("strategy", "name"),
    [(Scaffold(0.5, "uniform"), "control"), (FedDyn(2.0, "uniform"), "gradient")],
)
def test_the_servers_variate_is_the_mean_of_the_clients(strategy: Strategy, name: str) -> None:
    done = run(strategy, clients(), start(), ROUNDS, learning_rate=RATE, cohorts=COHORTS)

    mean = np.mean([flat(memory[name]) for memory in done.memories], axis=0)

    assert np.linalg.norm(mean) > 0.1
    np.testing.assert_allclose(flat(done.state[name]), mean, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "strategy", [Scaffold(1.0, "uniform"), FedDyn(0.5, "uniform"), MimeLite(1.0, 0.9, "uniform")]
)
def test_a_round_keeps_what_it_was_given(strategy: Strategy) -> None:
    weights = number(1.0)
    state = {name: number(2.0) for name in strategy.init(weights)}
    cohort = cohort_of([Outcome(1, 0.0, 0)], 256.0, extra=3.0)

    after, new_state = strategy.apply(weights, number(4.0), state, cohort)

    assert [one(weights), *(one(layers) for layers in state.values())] == [1.0, 2.0]
    for old, new in ((weights, after), *((state[n], new_state[n]) for n in state)):
        assert not np.shares_memory(old[0], new[0])


# where they converge: two bowls, of other shapes and with their minima in other places

SHAPES = (np.diag([1.0, 4.0]), np.array([[5.0, 2.0], [2.0, 1.5]]))
MINIMA = (np.array([3.0, 0.0]), np.array([-1.0, 2.0]))
ORIGIN = [np.array([5.0, -5.0])]


def bowls(steps: Sequence[int], examples: Sequence[int] = (1, 1)) -> list[Client]:
    return [
        bowl(a, b, steps=k, examples=n)
        for a, b, k, n in zip(SHAPES, MINIMA, steps, examples, strict=True)
    ]


def minimum(weights: Sequence[float] = (1, 1)) -> Array:
    """Where sum_i weight_i A_i (x - b_i) is zero."""
    return balance([p * a for p, a in zip(weights, SHAPES, strict=True)])


def balance(pulls: Sequence[Array]) -> Array:
    """Where sum_i pull_i (x - b_i) is zero."""
    return np.linalg.solve(sum(pulls), sum(q @ b for q, b in zip(pulls, MINIMA, strict=True)))


def way(shape: Array, steps: int, rate: float) -> Array:
    """Q with w_i - w = -Q (w - b_i) after the local steps: I - (I - rate A)^steps."""
    return np.eye(2) - np.linalg.matrix_power(np.eye(2) - rate * shape, steps)


def end(strategy: Strategy, of: list[Client], rounds: int, rate: float = RATE) -> Array:
    """The weights after many rounds, which have come to rest."""
    done = run(strategy, of, ORIGIN, rounds, learning_rate=rate)
    np.testing.assert_allclose(done.weights[0], done.history[-2][0], rtol=0, atol=1e-12)
    return done.weights[0]


@pytest.mark.parametrize("examples", [(1, 1), (1, 3)])
def test_fedavg_converges_beside_the_minimum(examples: tuple[int, int]) -> None:
    steps = 5
    rest = balance([n * way(a, steps, RATE) for n, a in zip(examples, SHAPES, strict=True)])

    x = end(FedAvg(), bowls((steps, steps), examples), 200)

    np.testing.assert_allclose(x, rest, rtol=0, atol=1e-9)
    assert np.linalg.norm(rest - minimum(examples)) > 0.2


@pytest.mark.parametrize("steps", [(5, 5), (2, 9)])
@pytest.mark.parametrize("weighting", ["uniform", "examples"])
@pytest.mark.parametrize(
    "make", [lambda weighting: Scaffold(1.0, weighting), lambda weighting: FedDyn(2.0, weighting)]
)
def test_scaffold_and_feddyn_converge_to_the_minimum(
    make: Callable[[str], Strategy], weighting: str, steps: tuple[int, int]
) -> None:
    examples = (1, 3)

    x = end(make(weighting), bowls(steps, examples), 200)

    best = minimum(examples if weighting == "examples" else (1, 1))
    np.testing.assert_allclose(x, best, rtol=0, atol=1e-9)
    assert np.linalg.norm(end(FedAvg(), bowls(steps, examples), 200) - best) > 0.2


@pytest.mark.parametrize("strategy", [Scaffold(1.0, "uniform"), FedDyn(2.0, "uniform")])
def test_they_do_so_if_only_one_client_takes_part_in_a_round(strategy: Strategy) -> None:
    rounds = 400
    turns = draw_cohorts(2, 1, rounds, seed=1)

    done = run(strategy, bowls((5, 5)), ORIGIN, rounds, learning_rate=RATE, cohorts=turns)

    np.testing.assert_allclose(done.weights[0], minimum(), rtol=0, atol=1e-9)


def test_what_scaffold_and_feddyn_remember_is_the_gradient_there() -> None:
    best = minimum()
    gradients = [a @ (best - b) for a, b in zip(SHAPES, MINIMA, strict=True)]

    scaffold = run(Scaffold(1.0, "uniform"), bowls((2, 9)), ORIGIN, 200, learning_rate=RATE)
    feddyn = run(FedDyn(2.0, "uniform"), bowls((2, 9)), ORIGIN, 200, learning_rate=RATE)

    for i, gradient in enumerate(gradients):
        assert np.linalg.norm(gradient) > 1
        np.testing.assert_allclose(scaffold.memories[i]["control"][0], gradient, atol=1e-9)
        np.testing.assert_allclose(feddyn.memories[i]["gradient"][0], gradient, atol=1e-9)


def test_fednova_does_not_lean_towards_the_busy_client() -> None:
    # The smaller the rate, the nearer FedNova comes to the minimum; FedAvg comes to the minimum
    # of a loss in which each client counts as often as it steps.
    steps, examples = (2, 10), (1, 1)
    busy = minimum(steps)
    distances = []
    for rate, rounds in ((0.02, 300), (0.002, 2500)):
        ways = [way(a, k, rate) for a, k in zip(SHAPES, steps, strict=True)]
        of = bowls(steps, examples)
        average = end(FedAvg(), of, rounds, rate)
        nova = end(FedNova(0.0), of, rounds, rate)
        np.testing.assert_allclose(average, balance(ways), rtol=0, atol=1e-8)
        per_step = [q / k for q, k in zip(ways, steps, strict=True)]
        np.testing.assert_allclose(nova, balance(per_step), rtol=0, atol=1e-8)
        distances.append((np.linalg.norm(nova - minimum()), np.linalg.norm(average - busy)))

    assert np.linalg.norm(busy - minimum()) > 0.5
    for far, near in zip(*distances, strict=True):  # of first order in the rate
        assert near == pytest.approx(far / 10, rel=0.2)
        assert near < 0.02


# in the compiled local epoch


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_the_compiled_epoch_corrects_alike(momentum: float) -> None:
    """Two rounds of one writer: what comes out solves the equations of the paper."""
    draw = np.random.default_rng(0)
    writer = Writer(
        "f0000_00",
        0,
        0,
        images=draw.integers(0, 256, (50, 28, 28), np.uint8),
        labels=draw.integers(0, CLASSES, 50, np.uint8),
        train=np.arange(50, dtype=np.int32),
        test=np.arange(0, dtype=np.int32),
    )
    local = Local(epochs=2, batch_size=20, learning_rate=0.1, momentum=momentum, weight_decay=0.0)
    path = 0.1 * local.steps(50)
    training = LocalTraining(Dense(True, ()), Scaffold(1.0, "uniform"), local, seed=3)
    size = training.parameters
    flat_start = flat(training.initial_weights)
    plain = LocalTraining(Dense(True, ()), FedAvg(), local, seed=3)
    plain.load(flat_start)
    own, c = np.zeros(size, np.float32), draw.normal(0, 0.01, size).astype(np.float32)
    delta, uncorrected, sums = np.empty(size, np.float32), np.empty(size, np.float32), None

    training.load(np.concatenate([flat_start, c]))
    for number in (1, 2):
        training.load_memory(own)
        training.train(writer, number, 0)
        training.delta(delta)
        sums = np.empty(2 * size)
        training.fold(1.0, sums, first=True)
        expected = own - c - delta / np.float32(path)
        np.testing.assert_allclose(np.concatenate(training.memory()), expected, rtol=0, atol=1e-6)
        np.testing.assert_allclose(sums[size:], expected - own, rtol=0, atol=1e-6)
        plain.train(writer, number, 0)
        plain.delta(uncorrected)
        if number == 1:  # c_i = 0: each step is longer by c, though gradients then differ a little
            np.testing.assert_allclose(delta - uncorrected, -path * c, rtol=0, atol=2e-3)
        own = np.concatenate(training.memory())
    assert training.traces == 1


@pytest.mark.parametrize(
    "strategy",
    [
        Scaffold(1.0, "uniform"),
        FedDyn(0.5, "uniform"),
        MimeLite(1.0, 0.9, "examples"),
        FedNova(0.0),
    ],
)
def test_a_writer_with_nothing_to_train_on_brings_no_nan(strategy: Strategy) -> None:
    local = Local(epochs=1, batch_size=20, learning_rate=0.1, momentum=0.0, weight_decay=0.0)
    training = LocalTraining(Dense(True, ()), strategy, local, seed=3)
    none = np.arange(0, dtype=np.int32)
    writer = Writer(
        "f0000_00", 0, 0, np.zeros((1, 28, 28), np.uint8), np.zeros(1, np.uint8), none, none
    )
    sums = np.ones((1 + strategy.sends_extra) * training.parameters)

    outcome = training.train(writer, 1, 0)
    training.fold(1.0, sums, first=True)

    assert strategy.weight(outcome, 3.0) in (0.0, ALIKE)
    assert not sums.any()
    if strategy.remembers:
        assert not np.concatenate(training.memory()).any()

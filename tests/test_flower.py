"""Flower's own strategies behind `Flower`, against the same classes driven as Flower does it."""

import gc
import inspect
import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flwr.serverapp.strategy
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from femfed import UserError, checkpoint, config
from femfed.strategies import columns, flower
from femfed.strategies.base import Cohort, State, Update, Weights
from femfed.strategies.fedavg import FedAvg
from femfed.strategies.flower import Flower
from tests.test_robust import on_a_disk

SHAPES = ((6, 5), (7,), (2, 2, 1, 3))
CLIENTS, ROUNDS = 8, 5

# Every strategy of Flower's that is taken, with arguments that are not its defaults.
ARGUMENTS: dict[str, dict[str, float]] = {
    "Bulyan": {"num_malicious_nodes": 1},
    "FedAdagrad": {"eta": 0.05, "tau": 0.01},
    "FedAdam": {"eta": 0.02, "beta_1": 0.8, "beta_2": 0.95, "tau": 0.01},
    "FedAvg": {},
    "FedAvgM": {"server_learning_rate": 0.7, "server_momentum": 0.9},
    "FedMedian": {},
    "FedTrimmedAvg": {"beta": 0.3},
    "FedYogi": {"eta": 0.02, "beta_1": 0.8, "beta_2": 0.95, "tau": 0.01},
    "Krum": {"num_malicious_nodes": 2},
    "MultiKrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 3},
    "QFedAvg": {"client_learning_rate": 0.3, "q": 0.5},
}
DEFAULTS = {name: {} for name in ARGUMENTS} | {"QFedAvg": {"client_learning_rate": 0.3}}
WHOLE = ("Bulyan", "Krum", "MultiKrum", "QFedAvg")  # look at all of a client's weights together
every_strategy = pytest.mark.parametrize("name", ARGUMENTS)


def made(name: str, **arguments: Any) -> Flower:
    return Flower({"_target_": f"flwr.serverapp.strategy.{name}", **arguments})


def some_weights(*seed: int) -> Weights:
    draw = np.random.default_rng(seed)
    return [draw.normal(0, 0.1, shape).astype(np.float32) for shape in SHAPES]


def some_updates(round: int, clients: int = CLIENTS) -> list[Update]:
    """Updates with losses and examples that differ from client to client and round to round."""
    return [
        Update(
            examples=20 + 7 * client + round,
            loss_sum=1000.0,
            correct=1,
            steps=3.0,
            loss_before=3.0 / (round + client),
            client=3 * client,
            delta=some_weights(round, client),
        )
        for client in range(clients)
    ]


def cohort_of(updates: list[Update]) -> Cohort:
    return Cohort(updates, len(updates), 40, 1.0, float(sum(u.examples for u in updates)), [])


def run(
    strategy: Callable[[], Flower], weights: Weights, state: State, rounds: Iterable[int]
) -> tuple[Weights, State]:
    """Run some rounds, every one with a strategy of its own."""
    for round in rounds:
        updates = some_updates(round)
        weights, state = strategy().combine(weights, updates, state, cohort_of(updates))
    return weights, state


def five_rounds(strategy: Flower) -> tuple[Weights, State]:
    weights = some_weights(99)
    return run(lambda: strategy, weights, strategy.init(weights), range(1, 1 + ROUNDS))


def record(layers: list[Any]) -> ArrayRecord:
    return ArrayRecord({f"layer {i}": Array(np.asarray(layer)) for i, layer in enumerate(layers)})


def as_flower_does(name: str, arguments: dict[str, float]) -> list[Any]:
    """Drive one strategy of Flower's over all rounds, its weights as they come from it."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0  # of messages
    gc.freeze()  # or QFedAvg and Bulyan take seconds, as they collect garbage at every reply
    theirs = getattr(flwr.serverapp.strategy, name)(**arguments)
    grid = SimpleNamespace(get_node_ids=lambda: list(range(1, 1 + CLIENTS)))
    arrays = record(some_weights(99))
    for round in range(1, 1 + ROUNDS):
        list(theirs.configure_train(round, arrays, ConfigRecord(), grid))
        replies = []
        sent = [layer.astype(np.float32) for layer in arrays.to_numpy_ndarrays()]
        for update in some_updates(round):
            trained = [w + d for w, d in zip(sent, update.delta, strict=True)]
            metrics = {"num-examples": update.examples, "train_loss": update.loss_before}
            content = RecordDict({"model": record(trained), "numbers": MetricRecord(metrics)})
            replies.append(Message(content, dst_node_id=7, message_type="train"))
        arrays, _ = theirs.aggregate_train(round, replies)
    gc.unfreeze()
    return arrays.to_numpy_ndarrays()


def same(ours: Weights, theirs: Weights) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def same_states(ours: State, theirs: State) -> bool:
    return list(ours) == list(theirs) and all(same(ours[name], theirs[name]) for name in ours)


def assert_close(ours: list[Any], theirs: list[Any]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-6)


# against Flower


def test_every_name_of_flower_is_taken_or_refused() -> None:
    assert set(flwr.serverapp.strategy.__all__) <= set(ARGUMENTS) | set(flower._REFUSED)
    assert not set(ARGUMENTS) & set(flower._REFUSED)


@every_strategy
def test_five_rounds_are_flowers(name: str) -> None:
    weights, _ = five_rounds(made(name, **ARGUMENTS[name]))

    assert_close(weights, as_flower_does(name, ARGUMENTS[name]))


@every_strategy
def test_five_rounds_are_flowers_with_its_defaults(name: str) -> None:
    weights, _ = five_rounds(made(name, **DEFAULTS[name]))

    assert_close(weights, as_flower_does(name, DEFAULTS[name]))


@pytest.mark.parametrize("name", sorted(set(ARGUMENTS) - {"FedAvg", "FedMedian"}))
def test_arguments_matter(name: str) -> None:
    ours, _ = five_rounds(made(name, **ARGUMENTS[name]))
    theirs, _ = five_rounds(made(name, **DEFAULTS[name]))

    assert not same(ours, theirs)


# on numbers typed by hand


def step(strategy: Flower, w: float, state: State, *deltas: float) -> tuple[float, State]:
    """One round of one weight: client i has i + 1 examples and a loss of 2 before training."""
    updates = [
        Update(i + 1, 77.0, 0, loss_before=2.0, client=i, delta=[np.float32([delta])])
        for i, delta in enumerate(deltas)
    ]
    (layer,), state = strategy.combine([np.float32([w])], updates, state, cohort_of(updates))
    return float(layer[0]), state


def first_step(strategy: Flower, w: float, *deltas: float) -> tuple[float, State]:
    return step(strategy, w, strategy.init([np.float32([w])]), *deltas)


def test_fedavg_weighs_by_examples() -> None:
    # 0.5 + (1 * 4 + 2 * 1 + 3 * 2) / 6 = 0.5 + 2
    assert first_step(made("FedAvg"), 0.5, 4.0, 1.0, 2.0)[0] == 2.5


def test_fedmedian_takes_the_middle() -> None:
    assert first_step(made("FedMedian"), 0.5, 1.0, 400.0, 2.0)[0] == 2.5


def test_fedavgm_remembers() -> None:
    # velocity 1, then 0.5 * 1 + 1: 0 -> 1 -> 2.5
    strategy = made("FedAvgM", server_momentum=0.5)
    w, state = first_step(strategy, 0.0, 1.0)

    assert w == 1.0
    assert step(strategy, w, state, 1.0)[0] == 2.5


def test_fedadam_corrects_bias_by_the_round_plus_one() -> None:
    # Round 1: m = 0.5, v = 0.25, rate 0.1 * sqrt(1 - 0.75**2) / (1 - 0.5**2) = 0.08819171
    #          w = 0.08819171 * 0.5 / (0.5 + 0.5) = 0.04409586
    # Round 2: m = 0.75, v = 0.4375, rate 0.1 * sqrt(1 - 0.75**3) / (1 - 0.5**3) = 0.08689661
    #          w = 0.04409586 + 0.08689661 * 0.75 / (0.66143783 + 0.5) = 0.10020946
    strategy = made("FedAdam", eta=0.1, beta_1=0.5, beta_2=0.75, tau=0.5)
    first, state = first_step(strategy, 0.0, 1.0)
    second, _ = step(strategy, first, state, 1.0)

    assert first == pytest.approx(0.04409586, abs=1e-7)
    assert second == pytest.approx(0.10020946, abs=1e-7)


def test_qfedavg_has_the_loss_of_the_global_weights() -> None:
    # L = 1 / 0.5 = 2, gradient 2 * (1 - 0) = 2, Delta = 2 * 2 = 4, h = 1 * 2**2 + 2 * 2 = 8
    strategy = made("QFedAvg", client_learning_rate=0.5, q=1.0)

    assert first_step(strategy, 1.0, -1.0)[0] == pytest.approx(0.5, abs=1e-7)
    assert strategy.needs == {"loss"}
    assert made("FedAvg").needs == set()


def test_krum_takes_one_client_of_the_crowd() -> None:
    # Squared distances to the two nearest: 1.25 has 0.0625 + 0.0625, 1 and 1.5 0.0625 + 0.25
    strategy = made("Krum", num_malicious_nodes=1)

    assert first_step(strategy, 0.0, 1.0, 1.25, 9.0, 1.5, 2.0)[0] == 1.25


# as a strategy of femfed's


def test_flowers_fedavg_is_ours() -> None:
    weights, updates = some_weights(99), some_updates(1)
    ours, _ = FedAvg().combine(weights, updates, {}, cohort_of(updates))

    strategy = made("FedAvg")
    theirs, _ = strategy.combine(weights, updates, strategy.init(weights), cohort_of(updates))

    assert_close(ours, theirs)


@every_strategy
def test_a_run_can_be_resumed_bit_for_bit(name: str, tmp_path: Path) -> None:
    def strategy() -> Flower:
        return made(name, **ARGUMENTS[name])

    weights, state = five_rounds(strategy())

    start = some_weights(99)
    ours, our_state = run(strategy, start, strategy().init(start), (1, 2))
    path = checkpoint.save(tmp_path, checkpoint.Checkpoint(2, ours, our_state))
    saved = checkpoint.load(path)
    ours, our_state = run(strategy, saved.weights, saved.state, (3, 4, 5))

    assert same(ours, weights)
    assert same_states(our_state, state)
    assert our_state["server_round"][0].tolist() == [5.0]


@every_strategy
def test_the_order_of_updates_does_not_matter(name: str) -> None:
    strategy, weights, updates = made(name, **ARGUMENTS[name]), some_weights(99), some_updates(1)
    state = strategy.init(weights)

    ours = strategy.combine(weights, updates, state, cohort_of(updates))
    theirs = strategy.combine(weights, updates[::-1], state, cohort_of(updates))

    assert same(ours[0], theirs[0])
    assert same_states(ours[1], theirs[1])


@every_strategy
def test_weights_and_state_keep_their_form_and_inputs_stay(name: str) -> None:
    strategy, weights = made(name, **ARGUMENTS[name]), some_weights(99)
    state = strategy.init(weights)
    for round in (1, 2):
        updates = some_updates(round)
        before = deepcopy((weights, [u.delta for u in updates], state))
        new_weights, new_state = strategy.combine(weights, updates, state, cohort_of(updates))

        assert same(weights, before[0])
        assert all(same(u.delta, d) for u, d in zip(updates, before[1], strict=True))
        assert same_states(state, before[2])
        assert list(new_state) == list(state)
        for ours, theirs in [(new_weights, weights), *((new_state[k], state[k]) for k in state)]:
            for a, b in zip(ours, theirs, strict=True):
                assert type(a) is np.ndarray
                assert (a.shape, a.dtype) == (b.shape, np.float32)
                assert np.isfinite(a).all()
                assert not np.shares_memory(a, b)
        weights, state = new_weights, new_state


@every_strategy
def test_pieces_change_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = made(name, **ARGUMENTS[name])
    weights, state = five_rounds(strategy)

    monkeypatch.setattr(flower, "_SMALLEST", 1)
    monkeypatch.setattr(flower, "_AT_ONCE", 4 * CLIENTS)
    parts = list(strategy._pieces(some_updates(1)))
    ours, our_state = five_rounds(strategy)

    # 30, 7 and 12 numbers, 4 at a time
    assert len(parts) == (1 if name in WHOLE else 8 + 2 + 3)
    assert same(ours, weights)
    assert same_states(our_state, state)


@every_strategy
def test_from_a_disk_come_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy, weights, updates = made(name, **ARGUMENTS[name]), some_weights(99), some_updates(1)
    state, cohort = strategy.init(weights), cohort_of(updates)
    monkeypatch.setattr(flower, "_SMALLEST", 1)
    monkeypatch.setattr(flower, "_AT_ONCE", 4 * CLIENTS)
    monkeypatch.setattr(columns, "_SPAN", 10 * CLIENTS)
    in_memory, its_state = strategy.combine(weights, updates, state, cohort)
    noted: list[tuple[int, int]] = []

    from_disk, our_state = strategy.combine(weights, on_a_disk(updates, noted), state, cohort)

    assert same(from_disk, in_memory)
    assert same_states(our_state, its_state)
    assert bool(noted) == (name not in WHOLE)


def test_a_mapping_and_its_text_are_one() -> None:
    krum = made("Krum", num_malicious_nodes=2)
    adam = made("FedAdam", tau=1, eta=0.5)

    assert Flower(krum.rule) == krum
    assert hash(Flower(krum.rule)) == hash(krum)
    assert made("FedAdam", eta=0.5, tau=1.0) == adam
    assert json.loads(adam.rule)["tau"] == 1.0
    assert krum != made("Krum", num_malicious_nodes=1)
    assert not krum.averages


def test_flower_is_silent_and_leaves_all_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("flwr")
    level = log.level
    log.setLevel(logging.DEBUG)
    try:
        five_rounds(made("QFedAvg", client_learning_rate=0.3))
        said = list(caplog.records)
        log.info("heard")
        assert log.level == logging.DEBUG
    finally:
        log.setLevel(level)

    assert said == []
    assert [r.message for r in caplog.records] == (["heard"] if log.propagate else [])
    assert gc.get_freeze_count() == 0


def test_flower_is_imported_when_it_is_needed() -> None:
    code = "import sys, femfed.strategies.flower; print('flwr' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.stdout.strip() == "False", done.stderr


# the command line


def from_line(*overrides: str) -> Any:
    return config.make(config.compose(["strategy=flower", *overrides]).strategy, "strategy")


def test_the_command_in_the_yaml_works() -> None:
    text = (config.CONF / "strategy" / "flower.yaml").read_text()
    words = re.findall(r"(?<=\s)\+?strategy\.rule\.\S+", text.split("\n_target_")[0])

    assert words == [
        "strategy.rule._target_=flwr.serverapp.strategy.Krum",
        "+strategy.rule.num_malicious_nodes=1",
    ]
    assert from_line(*words) == made("Krum", num_malicious_nodes=1)
    assert from_line() == made("FedAvg")


def test_all_that_can_be_chosen_stands_in_the_yaml() -> None:
    text = (config.CONF / "strategy" / "flower.yaml").read_text()

    assert all(re.search(rf"\b{name}\b", text) for name in ARGUMENTS)


@pytest.mark.parametrize(
    "target",
    [
        "Krum",
        "flwr.serverapp.strategy.Nothing",
        "flwr.serverapp.strategy.krum.Krum",
        "flwr.serverapp.strategy.os.system",
        "flwr.serverapp.strategy.Result",
        "flwr.serverapp.strategy.Strategy",
        "flwr.serverapp.strategy.",
        "flwr.server.strategy.Krum",
        "flwr.serverapp.strategy._KEEPS",
        "femfed.strategies.fedavg.FedAvg",
        "os.system",
        "",
        None,
        3,
    ],
)
def test_only_flowers_strategies_are_made(target: Any) -> None:
    with pytest.raises(UserError, match=rf"_target_={target}; .*one of Bulyan, .*QFedAvg$"):
        Flower({"_target_": target})


@pytest.mark.parametrize(("name", "why"), flower._REFUSED.items())
def test_what_is_more_than_an_aggregation_rule_is_refused(name: str, why: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"{name} {why}; expected ")) as refused:
        made(name)

    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("given", ["Krum", "[1]", "{", 3, None, ["a"], ("b",)])
def test_what_is_no_mapping_is_refused(given: Any) -> None:
    with pytest.raises(UserError, match=r"strategy\.rule=.*; expected _target_: flwr"):
        Flower(given)


@pytest.mark.parametrize("name", ["num_malicious", "fraction_train", "min_train_nodes", "eta_l"])
def test_an_argument_that_is_not_taken_is_named(name: str) -> None:
    with pytest.raises(UserError, match=rf"rule\.{name}=1; .*FedAdam but eta, beta_1, beta_2"):
        made("FedAdam", **{name: 1})


def test_arguments_of_another_kind_are_refused() -> None:
    for name in ("weighted_by_key", "train_metrics_aggr_fn", "selection_rule", "_args_"):
        with pytest.raises(UserError, match=rf"rule\.{name}=x; .* but num_malicious_nodes "):
            made("Bulyan", **{name: "x"})
    with pytest.raises(UserError, match=r"rule\.eta=1; .*FedAvg but none"):
        made("FedAvg", eta=1)


NUMBERS = [
    (name, argument)
    for name, arguments in ARGUMENTS.items()
    for argument in arguments
    if argument in inspect.signature(getattr(flwr.serverapp.strategy, name)).parameters
]


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "much", None, True, [1]])
@pytest.mark.parametrize(("name", "argument"), NUMBERS)
def test_a_bad_value_is_refused_by_name(name: str, argument: str, value: Any) -> None:
    line = f"strategy.rule.{argument}={value}; expected a "
    with pytest.raises(UserError, match=re.escape(line)):
        made(name, **{**ARGUMENTS[name], argument: value})


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("Krum", "num_malicious_nodes", 1.5),
        ("MultiKrum", "num_nodes_to_select", 0),
        ("FedAdam", "tau", 0.0),
        ("FedAdam", "beta_1", 1.0),
        ("FedAdam", "beta_2", 1),
        ("FedAvgM", "server_momentum", 1.0),
        ("FedTrimmedAvg", "beta", 0.5),
        ("QFedAvg", "client_learning_rate", 0.0),
    ],
)
def test_a_value_at_the_wrong_end_is_refused(name: str, argument: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"rule\.{argument}={value}; expected a "):
        made(name, **{**ARGUMENTS[name], argument: value})


def test_a_missing_argument_is_named() -> None:
    with pytest.raises(UserError, match=r"\+strategy\.rule\.client_learning_rate=NUMBER"):
        made("QFedAvg")


def test_a_round_that_flower_would_skip_ends_the_run() -> None:
    # 4 * 1 + 3 = 7
    strategy, weights = made("Bulyan", num_malicious_nodes=1), some_weights(99)
    enough, few = some_updates(1, 7), some_updates(1, 6)

    strategy.combine(weights, enough, strategy.init(weights), cohort_of(enough))
    with pytest.raises(UserError, match="does nothing with 6 clients; expected more"):
        strategy.combine(weights, few, strategy.init(weights), cohort_of(few))


def test_one_client_is_enough_for_the_others() -> None:
    for name in set(ARGUMENTS) - {"Bulyan"}:
        strategy, weights = made(name, **ARGUMENTS[name]), some_weights(99)
        alone = [replace(some_updates(1)[0], delta=[0 * w for w in weights])]

        still, _ = strategy.combine(weights, alone, strategy.init(weights), cohort_of(alone))

        assert_close(still, weights)

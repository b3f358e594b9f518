"""One battery for every conf/strategy/*.yaml: a new strategy is tested by being there."""

import dataclasses
import json
import pickle
import typing
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from femfed import UserError, config
from femfed.engine.wire import construct, describe
from femfed.strategies.base import Cohort, Outcome, State, Strategy, Update, Weights
from femfed.strategies.fedavg import FedAvg
from femfed.strategies.fedprox import FedProx

FILES = sorted((config.CONF / "strategy").glob("*.yaml"))
SHAPES = ((3, 2), (4,), (2, 2, 1, 3))

# Hyper-parameters that may be negative, and why: {"file.name": "reason"}.
ANY_SIGN: dict[str, str] = {}
# Strategies whose aggregate of identical updates is another update, and why: {"file": "reason"}.
NO_MEAN: dict[str, str] = {}

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def from_file(path: Path) -> Strategy:
    made = config.make(OmegaConf.load(path), "strategy")
    assert isinstance(made, Strategy)
    return made


def some_weights(seed: int) -> Weights:
    draw = np.random.default_rng(seed)
    return [draw.normal(0, 0.1, shape).astype(np.float32) for shape in SHAPES]


def some_updates(n: int = 10) -> list[Update]:
    """Updates of n clients with 20, 21, ... examples."""
    updates = []
    for client in range(n):
        delta = some_weights(client)
        outcome = Outcome(
            examples=20 + client,
            loss_sum=30.0 + client,
            correct=10 + client,
            steps=float(1 + client % 3),
            loss_before=2.0 + client / 10,
            squared_norm=float(sum((layer.astype(np.float64) ** 2).sum() for layer in delta)),
        )
        updates.append(Update(**vars(outcome), client=client, delta=delta))
    return updates


def cohort_of(strategy: Strategy, updates: Sequence[Update], extra: Weights) -> Cohort:
    """Return what the engine tells the server beside the mean of `updates`."""
    most_steps = max(update.steps for update in updates)
    return Cohort(
        outcomes=updates,
        drawn=len(updates),
        clients=40,
        most_steps=most_steps,
        weight_sum=sum(strategy.weight(update, most_steps) for update in updates),
        extra=extra if strategy.sends_extra else [],
    )


def forms(weights: Weights) -> list[tuple[Any, ...]]:
    return [(type(layer), layer.shape, layer.dtype) for layer in weights]


FORMS = [(np.ndarray, shape, np.dtype(np.float32)) for shape in SHAPES]


def same(ours: Weights, theirs: Weights) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def unchanged(now: Any, before: Any) -> bool:
    """Whether nested lists and dictionaries hold the same arrays."""
    if isinstance(now, dict):
        return set(now) == set(before) and all(unchanged(now[k], before[k]) for k in now)
    if isinstance(now, list | tuple):
        return all(unchanged(a, b) for a, b in zip(now, before, strict=True))
    return bool(np.array_equal(now, before))


def assert_close(ours: Weights, theirs: Weights) -> None:
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7, rtol=0)


def numeric_fields() -> list[Any]:
    """Every number among the hyper-parameters of every strategy: (path, name)."""
    found = []
    for path in FILES:
        for name, kind in typing.get_type_hints(type(from_file(path))).items():
            if {int, float} & {kind, *typing.get_args(kind)}:
                found.append(pytest.param(path, name, id=f"{path.stem}.{name}"))
    return found


# what a strategy is


@every_file
def test_a_file_lists_every_field(path: Path) -> None:
    keys = [str(key) for key in OmegaConf.load(path)]

    assert keys == ["_target_", *(field.name for field in dataclasses.fields(from_file(path)))]


@every_file
def test_fields_have_no_defaults(path: Path) -> None:
    for field in dataclasses.fields(from_file(path)):
        assert field.default is field.default_factory is dataclasses.MISSING, field.name


@every_file
def test_a_strategy_is_frozen(path: Path) -> None:
    strategy = from_file(path)

    for name in [field.name for field in dataclasses.fields(strategy)] or ["anything"]:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(strategy, name, 1)


@every_file
def test_a_strategy_is_its_values(path: Path) -> None:
    strategy, again = from_file(path), from_file(path)

    assert strategy is not again
    assert strategy == again
    assert hash(strategy) == hash(again)
    assert pickle.loads(pickle.dumps(strategy)) == strategy
    assert sum(strategy == from_file(other) for other in FILES) == 1


@every_file
def test_a_strategy_travels_as_json(path: Path) -> None:
    strategy = from_file(path)

    assert construct(json.loads(json.dumps(describe(strategy)))) == strategy


@pytest.mark.parametrize("value", [float("nan"), -1])
@pytest.mark.parametrize(("path", "name"), numeric_fields())
def test_a_bad_number_is_refused_by_name(path: Path, name: str, value: float) -> None:
    if value == -1 and f"{path.stem}.{name}" in ANY_SIGN:
        pytest.skip(ANY_SIGN[f"{path.stem}.{name}"])

    with pytest.raises(UserError, match=rf"strategy\.{name}={value}; expected"):
        dataclasses.replace(from_file(path), **{name: value})


def test_the_tables_name_what_is_there() -> None:
    names = {param.id for param in numeric_fields()}

    assert set(ANY_SIGN) <= names
    assert set(NO_MEAN) <= {path.stem for path in FILES}
    assert "fedprox.proximal_mu" in names


# the client's half


@every_file
def test_gradients_keep_their_form(path: Path) -> None:
    strategy = from_file(path)
    gradients, weights, origin = some_weights(0), some_weights(1), some_weights(2)
    memory, state = strategy.new_memory(some_weights(3)), strategy.init(some_weights(3))
    before = deepcopy((gradients, weights, origin, memory, state))

    corrected = strategy.correct_gradients(gradients, weights, origin, memory, state)
    personal = strategy.correct_personal_gradients(gradients, weights, origin)

    assert forms(list(corrected)) == forms(list(personal)) == FORMS
    assert unchanged((gradients, weights, origin, memory, state), before)


@every_file
def test_a_client_keeps_the_form_of_what_it_remembers_and_sends(path: Path) -> None:
    strategy, initial = from_file(path), some_weights(3)
    weights, origin, gradient = some_weights(0), some_weights(1), some_weights(2)
    memory, state = strategy.new_memory(initial), strategy.init(initial)
    before = deepcopy((weights, origin, gradient, memory, state, initial))
    full = gradient if "gradient" in strategy.needs else []

    start = strategy.begin(origin, memory)
    kept, extra = strategy.finish(weights, origin, memory, state, 0.5, full)
    own = strategy.personal_weights(origin, kept)

    assert forms(list(start)) == forms(list(own)) == FORMS
    assert forms(list(extra)) == (FORMS if strategy.sends_extra else [])
    assert {name: forms(list(each)) for name, each in kept.items()} == {
        name: forms(each) for name, each in memory.items()
    }
    assert strategy.remembers == bool(memory)
    assert set(strategy.broadcasts) <= set(state)
    assert all(forms(state[name]) == FORMS for name in strategy.broadcasts)
    assert strategy.needs <= {"loss", "gradient", "norm"}
    assert unchanged((weights, origin, gradient, memory, state, initial), before)


@every_file
def test_what_keeps_still_is_named_by_position(path: Path) -> None:
    phases = from_file(path).phases(8)

    assert all(set(still) < set(range(8)) for _, still in phases)
    ends = [end for end, _ in phases]
    assert ends == sorted(ends)
    assert not ends or ends[-1] == 1.0


# the server's half


@every_file
def test_identical_updates_give_that_update(path: Path) -> None:
    if path.stem in NO_MEAN:
        pytest.skip(NO_MEAN[path.stem])
    delta = some_weights(0)
    updates = [dataclasses.replace(update, delta=deepcopy(delta)) for update in some_updates()]

    assert_close(from_file(path).aggregate(updates), delta)


@every_file
def test_one_update_is_its_own_aggregate(path: Path) -> None:
    if path.stem in NO_MEAN:
        pytest.skip(NO_MEAN[path.stem])
    (update,) = some_updates(1)

    assert_close(from_file(path).aggregate([update]), update.delta)


@every_file
def test_the_order_of_updates_does_not_matter(path: Path) -> None:
    strategy, updates = from_file(path), some_updates()
    shuffled = [updates[i] for i in np.random.default_rng(0).permutation(len(updates))]

    assert_close(strategy.aggregate(updates), strategy.aggregate(shuffled))


@every_file
@pytest.mark.parametrize("n", [1, 2, 10])
def test_an_aggregate_keeps_the_form_and_its_inputs(path: Path, n: int) -> None:
    updates = some_updates(n)
    before = deepcopy(updates)

    delta = from_file(path).aggregate(updates)

    assert forms(delta) == FORMS
    assert all(same(a.delta, b.delta) for a, b in zip(updates, before, strict=True))
    assert not any(
        np.shares_memory(ours, theirs)
        for update in updates
        for ours, theirs in zip(delta, update.delta, strict=True)
    )


def assert_state(state: State) -> None:
    """A state is what a checkpoint can hold: float32 arrays in lists by name."""
    assert isinstance(state, dict)
    for name, layers in state.items():
        assert isinstance(name, str)
        assert all(type(w) is np.ndarray and w.dtype == np.float32 for w in layers), name


@every_file
def test_applying_keeps_the_form_and_its_inputs(path: Path) -> None:
    strategy, weights = from_file(path), some_weights(0)
    state = strategy.init(weights)
    names = list(state)

    for number in range(1, 4):
        delta, updates = some_weights(number), some_updates(number)
        cohort = cohort_of(strategy, updates, some_weights(9))
        before = deepcopy((weights, delta, state))
        new_weights, new_state = strategy.apply(weights, delta, state, cohort)

        assert forms(new_weights) == FORMS
        assert_state(new_state)
        assert list(new_state) == names
        assert same(weights, before[0])
        assert same(delta, before[1])
        assert all(same(state[name], before[2][name]) for name in names)
        assert all(np.isfinite(layer).all() for layer in new_weights)
        weights, state = new_weights, new_state


@every_file
def test_applying_is_a_function(path: Path) -> None:
    def two_rounds() -> tuple[Weights, State]:
        strategy, weights = from_file(path), some_weights(0)
        state = strategy.init(weights)
        for number in (1, 2):
            cohort = cohort_of(strategy, some_updates(), some_weights(9))
            weights, state = strategy.apply(weights, some_weights(number), state, cohort)
        return weights, state

    (ours, our_state), (theirs, their_state) = two_rounds(), two_rounds()

    assert same(ours, theirs)
    assert all(same(our_state[name], their_state[name]) for name in our_state)


@every_file
def test_a_round_without_news_keeps_the_weights_from_the_start(path: Path) -> None:
    strategy, weights = from_file(path), some_weights(0)

    nothing = [0 * w for w in weights]
    idle = [dataclasses.replace(update, squared_norm=0.0) for update in some_updates()]
    cohort = cohort_of(strategy, idle, nothing)
    still, _ = strategy.apply(weights, nothing, strategy.init(weights), cohort)

    assert same(still, weights)


# single strategies, on numbers typed by hand


def a_number(examples: int, value: float) -> Update:
    return Update(examples, 0.0, 0, delta=[np.float32([value])])


def one(weights: Sequence[Any]) -> float:
    (layer,) = weights
    return float(layer[0])


def test_fedavg_weighs_by_examples() -> None:
    # (1 * 4 + 2 * 1 + 1 * -2) / (1 + 2 + 1) = 4 / 4
    updates = [a_number(1, 4.0), a_number(2, 1.0), a_number(1, -2.0)]

    delta = FedAvg().aggregate(updates)
    cohort = cohort_of(FedAvg(), updates, [])
    weights, state = FedAvg().apply([np.float32([0.5])], delta, {}, cohort)

    assert one(delta) == 1.0
    assert (one(weights), state) == (1.5, {})
    assert FedAvg().averages


def test_whoever_aggregates_otherwise_does_not_average() -> None:
    class First(Strategy):
        def aggregate(self, updates: Sequence[Update]) -> Weights:
            return updates[0].delta

    assert not First().averages
    assert FedProx(1.0).averages


def test_fedprox_pulls_back() -> None:
    # 1 + 0.5 * (3 - 7) = -1
    gradients, weights, origin = [np.float32([1.0])], [np.float32([3.0])], [np.float32([7.0])]

    assert one(FedProx(0.5).correct_gradients(gradients, weights, origin, {}, {})) == -1.0


def test_fedprox_without_pull_is_fedavg() -> None:
    gradients = some_weights(0)
    arguments = (gradients, some_weights(1), some_weights(2), {}, {})

    assert same(list(FedProx(0.0).correct_gradients(*arguments)), gradients)
    assert same(FedProx(0.0).aggregate(some_updates()), FedAvg().aggregate(some_updates()))

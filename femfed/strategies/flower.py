"""Flower: any strategy of `flwr.serverapp.strategy` that is an aggregation rule."""

import contextlib
import gc
import inspect
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from femfed import UserError
from femfed.strategies.base import Cohort, State, Strategy, Update, Weights
from femfed.strategies.columns import parts_of, spans

_HOME = "flwr.serverapp.strategy"

# Strategy -> what it keeps from round to round, in attributes of these names.
_KEEPS: dict[str, tuple[str, ...]] = {
    "Bulyan": (),
    "FedAdagrad": ("v_t",),  # its m_t is the last update
    "FedAdam": ("m_t", "v_t"),
    "FedAvg": (),
    "FedAvgM": ("momentum_vector",),
    "FedMedian": (),
    "FedTrimmedAvg": (),
    "FedYogi": ("m_t", "v_t"),
    "Krum": (),
    "MultiKrum": (),
    "QFedAvg": (),
}
# Those that look at all of a client's weights together; the others treat each weight by itself,
# so that they can be given the weights piece by piece.
_WHOLE = {"Bulyan", "Krum", "MultiKrum", "QFedAvg"}
_AT_ONCE = 1 << 22  # numbers of all clients together in a piece: 16 MiB, and a few times that
_SMALLEST = 1 << 14  # numbers of one client in a piece: below, messages cost more than sums

_NOISE = "draws its noise from NumPy's global state, so that no run could be repeated"
_CLIP = "needs clients that clip their own updates"
_TREES = "aggregates XGBoost's trees, not weights"
_REFUSED = {
    "DifferentialPrivacyClientSideAdaptiveClipping": _CLIP,
    "DifferentialPrivacyClientSideFixedClipping": _CLIP,
    "DifferentialPrivacyServerSideAdaptiveClipping": _NOISE,
    "DifferentialPrivacyServerSideFixedClipping": _NOISE,
    "FedProx": "needs clients that add a proximal term; use strategy=fedprox, where they do",
    "FedXgbBagging": _TREES,
    "FedXgbCyclic": _TREES,
    "Result": "is no strategy",
    "Strategy": "is abstract",
}

# Arguments are finite numbers of at least 0; these are above 0, and those below a number.
_ABOVE_ZERO = {"client_learning_rate", "num_nodes_to_select", "tau"}
_BELOW = {"beta": 0.5, "beta_1": 1.0, "beta_2": 1.0, "server_momentum": 1.0}
# Arguments about what femfed does itself: whom to draw, and how clients train.
_OURS = ("fraction_", "min_", "eta_l")

_Part = dict[str, tuple[int, slice]]  # name in Flower's records -> which layer, which piece of it


@dataclass(frozen=True)
class Flower(Strategy):
    """One of Flower's own strategies aggregates what femfed's clients send.

    ```
    client:  as in FedAvg
    server:  replies = [w + delta_i with "num-examples" n_i]     float32, in the clients' order
             w <- rule.aggregate_train(round, replies)
    ```

    Every round makes a new strategy of Flower's and hands it the global weights and the state of
    the round before. A round stays a function of (weights, updates, state), and a resumed run ends
    with the same bits.

    `flwr.serverapp.strategy.FedAvg` is `strategy=fedavg` up to rounding, because Flower sums in
    float32. FedAdam and QFedAvg return float64, and FedAdam then keeps float64 as well; here both
    weights and state are rounded to float32 every round, which moved weights of 0.2 by less than
    1e-7 in 50 rounds. The others compute in float32 and give Flower's own bits.

    Flower's strategies follow the papers they cite with these differences: FedAdam corrects bias
    by the number of the round plus one, FedYogi and FedAdagrad do not; Bulyan skips a round with
    fewer than `4 * num_malicious_nodes + 3` clients without a word, which is an error here. QFedAvg
    is given the loss of the global weights as its `train_loss`, as in its paper and the authors'
    code, and takes its `client_learning_rate` for `1 / L`: it should be `local.learning_rate`.

    Strategies that treat each weight by itself get the weights in pieces, so that memory does not
    grow with the cohort beyond the updates. Bulyan, Krum, MultiKrum and QFedAvg need all weights of
    all clients at once, and Flower copies them several times.

    Source: D. J. Beutel, T. Topal, A. Mathur, X. Qiu, J. Fernandez-Marques, Y. Gao, L. Sani,
    K. H. Li, T. Parcollet, P. P. B. de Gusmao, N. D. Lane, "Flower: A Friendly Federated Learning
    Research Framework", 2020, https://arxiv.org/abs/2007.14390

    Attributes:
        rule: `{"_target_": "flwr.serverapp.strategy.NAME", argument: number, ...}`, or the
            same as JSON text, which it is kept as: so it can be hashed and sent. Arguments are
            NAME's own; those about drawing clients and naming records are not taken.
    """

    rule: Any

    def __post_init__(self) -> None:
        given = self.rule
        if isinstance(given, str):
            with contextlib.suppress(ValueError):
                given = json.loads(given)
        if not isinstance(given, Mapping):
            raise UserError(
                f"strategy.rule={self.rule}; expected _target_: {_HOME}.NAME and "
                "NAME's arguments, as in conf/strategy/flower.yaml"
            )
        target = given.get("_target_")
        made = {"_target_": target, **_checked(_name(target), given)}
        object.__setattr__(self, "rule", json.dumps(made, sort_keys=True))

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """The loss of the global weights, where it is QFedAvg."""
        return frozenset({"loss"} if self._name == "QFedAvg" else ())

    def init(self, weights: Weights) -> State:
        """Return zeros for what Flower's strategy keeps, and how many rounds it has seen."""
        zeros = {name: [np.zeros(w.shape, np.float32) for w in weights] for name in self._keeps}
        return {**zeros, "server_round": [np.zeros(1, np.float32)]}

    def combine(
        self, weights: Weights, updates: Sequence[Update], state: State, cohort: Cohort
    ) -> tuple[Weights, State]:
        """Return what Flower's strategy makes of the clients' weights.

        Raises:
            UserError: it makes nothing of so few clients.
        """
        updates = sorted(updates, key=lambda update: update.client)
        round = int(state["server_round"][0][0]) + 1
        after = [np.empty(w.shape, np.float32) for w in weights]
        kept = {name: [np.empty(w.shape, np.float32) for w in weights] for name in self._keeps}
        with _undisturbed():
            for part, deltas in self._pieces(updates):
                made = self._aggregated(part, deltas, weights, updates, state, round)
                for target, pieces in zip([after, *kept.values()], made, strict=True):
                    for (place, piece), values in zip(part.values(), pieces, strict=True):
                        target[place].reshape(-1)[piece] = values
        return after, {**kept, "server_round": [np.full(1, round, np.float32)]}

    def _aggregated(
        self,
        part: _Part,
        deltas: Sequence[Weights],
        weights: Weights,
        updates: Sequence[Update],
        state: State,
        round: int,
    ) -> list[list[Any]]:
        """Return a part of the next weights, and of each list that is kept, as Flower has it."""
        from flwr.app import (
            Array,
            ArrayRecord,
            ConfigRecord,
            Message,
            Metadata,
            MetricRecord,
            RecordDict,
        )

        # With no share of clients to draw, all that configure_train does is note the weights.
        rule = self._made(fraction_train=0.0)
        before = ArrayRecord({key: Array(piece) for key, piece in _cut(weights, part).items()})
        rule.configure_train(round, before, ConfigRecord(), None)
        for name in self._keeps:
            pieces = _cut(state[name], part)
            listed = name == "momentum_vector"
            setattr(rule, name, list(pieces.values()) if listed else pieces)
        replies = []
        for update, its_deltas in zip(updates, deltas, strict=True):
            local = ArrayRecord()
            for (key, (place, piece)), delta in zip(part.items(), its_deltas, strict=True):
                local[key] = Array(np.ravel(weights[place])[piece] + delta)
            about = MetricRecord()
            about["num-examples"], about["train_loss"] = update.examples, update.loss_before
            content = RecordDict({"arrays": local, "metrics": about})
            # A message that is given its metadata does not ask which of Flower's tasks this is.
            address = Metadata(
                run_id=1,
                message_id="",
                src_node_id=update.client,
                dst_node_id=0,
                reply_to_message_id="",
                group_id="",
                created_at=0.0,
                ttl=1.0,
                message_type="train",
            )
            replies.append(Message(content=content, metadata=address))  # type: ignore[call-overload]
        arrays, _ = rule.aggregate_train(round, replies)
        if arrays is None:
            raise UserError(
                f"strategy.rule={self.rule} does nothing with {len(updates)} clients; "
                "expected more (clients_per_round; Bulyan needs 4 * num_malicious_nodes + 3)"
            )
        made = [[arrays[key].numpy() for key in part]]
        for name in self._keeps:
            values = getattr(rule, name)
            made.append(list(values.values()) if isinstance(values, dict) else values)
        return made

    def _pieces(self, updates: Sequence[Update]) -> Iterator[tuple[_Part, list[Weights]]]:
        """Yield what Flower's strategy is given of the updates at a time: all, or some."""
        if self._name in _WHOLE:
            part = {str(place): (place, slice(None)) for place in range(len(updates[0].delta))}
            yield part, [[np.ravel(layer) for layer in update.delta] for update in updates]
            return
        length = max(_SMALLEST, _AT_ONCE // len(updates))
        for some, pieces_of in spans(updates, parts_of(updates, length)):
            for each in some:
                yield {"0": each}, [[piece] for piece in pieces_of(each)]

    @property
    def _name(self) -> str:
        return _name(json.loads(self.rule)["_target_"])

    @property
    def _keeps(self) -> tuple[str, ...]:
        return _KEEPS[self._name]

    def _made(self, **arguments: Any) -> Any:
        from flwr.serverapp import strategy

        given = json.loads(self.rule)
        return getattr(strategy, _name(given.pop("_target_")))(**given, **arguments)


def _name(target: Any) -> str:
    """Return NAME of `flwr.serverapp.strategy.NAME`.

    Raises:
        UserError: it is none, or more than an aggregation rule.
    """
    name = str(target).removeprefix(f"{_HOME}.")
    if target == f"{_HOME}.{name}" and name in _KEEPS:
        return name
    why = f"{name} {_REFUSED[name]}; " if target == f"{_HOME}.{name}" and name in _REFUSED else ""
    raise UserError(
        f"strategy.rule._target_={target}; {why}expected {_HOME}.NAME with NAME one of "
        f"{', '.join(_KEEPS)}"
    )


def _checked(name: str, given: Mapping[Any, Any]) -> dict[str, float]:
    """Return the arguments that `given` has for Flower's strategy `name`, as its types.

    Raises:
        UserError: one of them is wrong or missing.
    """
    from flwr.serverapp import strategy

    known = {
        each.name: each
        for each in inspect.signature(getattr(strategy, name)).parameters.values()
        if each.annotation in (int, float) and not each.name.startswith(_OURS)
    }
    arguments = {}
    for key, value in given.items():
        if key == "_target_":
            continue
        if key not in known:
            raise UserError(
                f"strategy.rule.{key}={value}; expected no argument of {_HOME}.{name} but "
                f"{', '.join(known) or 'none'} (clients are drawn and trained as femfed does)"
            )
        kind, below = known[key].annotation, _BELOW.get(key, float("inf"))
        right = isinstance(value, int | kind) and not isinstance(value, bool)
        if not (right and 0 <= value < below) or (value == 0 and key in _ABOVE_ZERO):
            limit = "above 0" if key in _ABOVE_ZERO else "at least 0"
            limit += f" and below {below:g}" if key in _BELOW else ""
            article = "a whole number" if kind is int else "a number"
            raise UserError(f"strategy.rule.{key}={value}; expected {article} {limit}")
        arguments[key] = kind(value)
    for key, argument in known.items():
        if argument.default is argument.empty and key not in arguments:
            raise UserError(
                f"strategy.rule.{key} is not given; expected "
                f"+strategy.rule.{key}=NUMBER, without which there is no {_HOME}.{name}"
            )
    return arguments


def _cut(layers: Weights, part: _Part) -> dict[str, Any]:
    return {key: np.ravel(layers[place])[piece] for key, (place, piece) in part.items()}


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Silence Flower's log, and make the garbage collections that it asks for cheap.

    QFedAvg and Bulyan collect after every reply, which takes as long as there are objects to look
    through: with TensorFlow loaded more than a tenth of a second. Frozen objects are left out.
    """
    log = logging.getLogger("flwr")
    level, frozen = log.level, gc.get_freeze_count()
    log.setLevel(logging.CRITICAL + 1)
    gc.freeze()
    try:
        yield
    finally:
        log.setLevel(level)
        if not frozen:  # by somebody else, who wants it so
            gc.unfreeze()

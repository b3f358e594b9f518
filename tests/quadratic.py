"""A federation in a page of NumPy: least-squares clients, and a round loop on a strategy's hooks.

`run` does to arrays what the engine does to a model, so that a strategy can be followed in
float64 to where it converges, and compared with the algorithm as its paper writes it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from femfed.strategies.base import Cohort, Outcome, State, Strategy, Update

Array = NDArray[Any]
Layers = list[Array]


@dataclass(frozen=True)
class Client:
    """Somebody whose loss has a gradient.

    Attributes:
        gradient: (weights, batch) -> gradient of the mean loss over a batch; over all for None.
        loss: weights -> mean loss over all.
        examples: weight of the client in FedAvg.
        batches: local steps an epoch.
        epochs: local epochs a round.
    """

    gradient: Callable[[Layers, int | None], Layers]
    loss: Callable[[Layers], float]
    examples: int
    batches: int = 1
    epochs: int = 1


def bowl(curvature: Array, minimum: Array, *, steps: int, examples: int = 1) -> Client:
    """Return a client whose loss is `1/2 (x - minimum)^T curvature (x - minimum)`."""

    def gradient(weights: Layers, batch: int | None) -> Layers:
        return [(curvature @ (weights[0] - minimum)).astype(weights[0].dtype)]

    def loss(weights: Layers) -> float:
        away = weights[0] - minimum
        return float(away @ curvature @ away) / 2

    return Client(gradient, loss, examples, batches=steps)


def least_squares(inputs: Array, targets: Array, *, batch_size: int, epochs: int) -> Client:
    """Return a client whose loss is `mean((inputs @ slope + offset - targets)^2) / 2`.

    Its weights are two layers, slope and offset; its batches are in order, the last one shorter.
    """
    n = len(inputs)

    def residual(weights: Layers, rows: slice) -> Array:
        slope, offset = (layer.astype(np.float64) for layer in weights)
        return inputs[rows] @ slope + offset - targets[rows]

    def gradient(weights: Layers, batch: int | None) -> Layers:
        rows = slice(0, n)
        if batch is not None:
            rows = slice(batch * batch_size, (batch + 1) * batch_size)
        wrong = residual(weights, rows)
        full = [inputs[rows].T @ wrong / len(wrong), np.array([wrong.mean()])]
        return [g.astype(w.dtype) for g, w in zip(full, weights, strict=True)]

    def loss(weights: Layers) -> float:
        return float((residual(weights, slice(0, n)) ** 2).mean()) / 2

    return Client(gradient, loss, n, batches=-(-n // batch_size), epochs=epochs)


@dataclass
class Run:
    """What a run came to.

    Attributes:
        history: the global weights before the first round and after every one.
        state: the strategy's state after the last round.
        memories: what each client remembers.
    """

    history: list[Layers]
    state: State
    memories: list[dict[str, Layers]] = field(default_factory=list)

    @property
    def weights(self) -> Layers:
        """The global weights after the last round."""
        return self.history[-1]


def draw_cohorts(clients: int, per_round: int, rounds: int, seed: int) -> list[list[int]]:
    """Return the clients of each round, drawn without replacement, in ascending order."""
    draw = np.random.default_rng(seed)
    return [sorted(draw.choice(clients, per_round, replace=False).tolist()) for _ in range(rounds)]


def run(
    strategy: Strategy,
    clients: Sequence[Client],
    weights: Layers,
    rounds: int,
    *,
    learning_rate: float,
    cohorts: Sequence[Sequence[int]] | None = None,
    momentum: float = 0.0,
) -> Run:
    """Run a strategy as the engine does, in the precision of `weights`.

    Args:
        strategy: any that exchanges weights and does not pool images.
        clients: of the federation.
        weights: the initial weights, a list of layers.
        rounds: how many.
        learning_rate: of the clients.
        cohorts: the clients of each round; everybody if not given.
        momentum: of the clients.
    """
    initial = [w.copy() for w in weights]
    done = Run([initial], strategy.init(initial), [strategy.new_memory(initial) for _ in clients])
    for number in range(rounds):
        cohort = range(len(clients)) if cohorts is None else cohorts[number]
        origin = done.weights
        state = {name: done.state[name] for name in strategy.broadcasts}
        updates, extras = [], []
        for place in cohort:
            update, extra, done.memories[place] = _train(
                strategy,
                clients[place],
                origin,
                done.memories[place],
                state,
                learning_rate,
                momentum,
                place,
            )
            updates.append(update)
            extras.append(extra)
        most_steps = max(update.steps for update in updates)
        shares = [strategy.weight(update, most_steps) for update in updates]
        summary = Cohort(
            outcomes=[Outcome(**_outcome(update)) for update in updates],
            drawn=len(updates),
            clients=len(clients),
            most_steps=max(update.steps for update in updates),
            weight_sum=sum(shares),
            extra=_mean(extras, shares) if strategy.sends_extra else [],
        )
        if strategy.averages:
            delta = _mean([update.delta for update in updates], shares)
            after, done.state = strategy.apply(origin, delta, done.state, summary)
        else:
            after, done.state = strategy.combine(origin, updates, done.state, summary)
        done.history.append(after)
    return done


def _train(
    strategy: Strategy,
    client: Client,
    origin: Layers,
    memory: dict[str, Layers],
    state: State,
    learning_rate: float,
    momentum: float,
    place: int,
) -> tuple[Update, Sequence[Array], dict[str, Layers]]:
    """Return what a client sends, what it sends besides, and what it remembers."""
    memory = dict(memory)
    if type(strategy).correct_personal_gradients is not Strategy.correct_personal_gradients:
        memory["personal"], _ = _descend(
            strategy,
            client,
            memory["personal"],
            learning_rate,
            momentum,
            lambda g, w: strategy.correct_personal_gradients(g, w, origin),
        )
    gradient = client.gradient(origin, None) if "gradient" in strategy.needs else []
    weights, steps = _descend(
        strategy,
        client,
        list(strategy.begin(origin, memory)),
        learning_rate,
        momentum,
        lambda g, w: strategy.correct_gradients(g, w, origin, memory, state),
    )
    kept, extra = strategy.finish(weights, origin, memory, state, steps * learning_rate, gradient)
    delta = [w - w_global for w, w_global in zip(weights, origin, strict=True)]
    update = Update(
        examples=client.examples,
        loss_sum=client.examples * client.loss(weights),
        correct=0,
        steps=steps,
        loss_before=client.loss(origin) if "loss" in strategy.needs else 0.0,
        squared_norm=sum(float((d * d).sum()) for d in delta) if "norm" in strategy.needs else 0.0,
        client=place,
        delta=delta,
    )
    return update, extra, {name: list(layers) for name, layers in kept.items()}


def _descend(
    strategy: Strategy,
    client: Client,
    weights: Layers,
    learning_rate: float,
    momentum: float,
    correct: Callable[[Layers, Layers], Sequence[Array]],
) -> tuple[Layers, float]:
    """Return the weights after a client's local steps, and how often gradients entered them."""
    velocity = [np.zeros_like(w) for w in weights]
    entered, reach = 0.0, 0.0
    steps, phases = client.epochs * client.batches, strategy.phases(len(weights))
    for step in range(steps):
        along = correct(client.gradient(weights, step % client.batches), weights)
        still = next((places for end, places in phases if step < round(end * steps)), ())
        along = [0 * g if place in still else g for place, g in enumerate(along)]
        velocity = [momentum * v + g for v, g in zip(velocity, along, strict=True)]
        weights = [w - learning_rate * v for w, v in zip(weights, velocity, strict=True)]
        # A gradient enters once, then momentum times, then momentum^2 times ...
        reach = momentum * reach + 1.0
        entered += reach
    return weights, entered


def _mean(vectors: Sequence[Sequence[Array]], shares: Sequence[float]) -> Layers:
    """Return the weighted mean of lists of layers, summed in float64."""
    return [
        np.asarray(
            sum(s * v.astype(np.float64) for s, v in zip(shares, layer, strict=True)) / sum(shares),
            layer[0].dtype,
        )
        for layer in zip(*vectors, strict=True)
    ]


def _outcome(update: Update) -> dict[str, Any]:
    return {each.name: getattr(update, each.name) for each in fields(Outcome)}

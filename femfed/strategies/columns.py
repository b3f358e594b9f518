"""What the robust rules share, no strategy itself.

The updates coordinate by coordinate, their distances, Krum's scores, how many clients may lie.
"""

import contextlib
import functools
import itertools
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from femfed import UserError
from femfed.strategies.base import Update, Weights

_PART = 2**18  # values handled at a time
_LEAST = 2**12  # coordinates multiplied at a time: of fewer, to look into all updates costs more
_ROW = 2**15  # coordinates compared at a time: enough that NumPy's calls cost less than their work
_MOST_COMPARED = 64  # updates: of more, a coordinate's values are sooner sorted by themselves
_GROUPS = 32  # of a span's parts at most, whose inner products are added up by themselves
_SPAN = 2**26  # values that all cores work on before any goes on: what is read from a disk at once
_BLOCK = 2**10  # values of float32 that a disk reads at least
_READERS = 2  # threads: one leaves a disk idle between what it asks for

Part = tuple[int, slice]  # a layer, and a piece of it flattened
Pieces = list[NDArray[np.float32]]  # a part of every update, `[coordinates]` each
# Two places, and whether the smaller value at the one and the larger at the other matter later.
_Comparison = tuple[int, int, bool, bool]


def by_rank(
    updates: Sequence[Update],
    ranks: Sequence[int],
    rule: Callable[[Sequence[NDArray[np.float32]]], NDArray[np.floating[Any]]],
) -> Weights:
    """Return what `rule` makes of every coordinate's values in ascending order, on all cores.

    Memory does not grow with the model: a core has a few copies of 2^15 coordinates of all updates
    at a time, 8 MiB each for 64 updates, and of 2^18 values, 1 MiB, for more. Updates on a disk
    take some 512 MiB besides, here and below, and more where they are thousands.

    Args:
        updates: of n clients, at least one.
        ranks: places in the order that the rule looks at, of 0 to n - 1.
        rule: given n arrays `[coordinates]` to read, the k-th smallest values k-th where k is of
            `ranks`, whatever elsewhere; returns `[coordinates]`. Called from many threads.
    """
    n = len(updates)
    compares = n <= _MOST_COMPARED
    network = _network(n, tuple(ranks)) if compares else ()

    def made(scratch: _Scratch, pieces: Pieces) -> NDArray[np.floating[Any]]:
        if compares:
            return rule(_compared(scratch, pieces, network))
        rows = scratch.rows(pieces, np.float32)
        columns = scratch.array("columns", rows.shape[::-1], np.float32)
        np.copyto(columns, rows.T)
        columns.sort(axis=1)
        return rule(list(columns.T))

    return _by_part(updates, made, parts_of(updates, _ROW if compares else _PART // n))


def weighted_mean(updates: Sequence[Update], weights: NDArray[np.float64]) -> Weights:
    """Return the sum of the updates times their weights, summed in float64, on all cores.

    Args:
        updates: of n clients, at least one.
        weights: `[n]`, of sum 1.
    """
    return _by_part(
        updates,
        lambda scratch, pieces: weights @ scratch.rows(pieces, np.float64),
        _to_multiply(updates),
    )


def gram_matrix(updates: Sequence[Update]) -> NDArray[np.float64]:
    """Return the inner products of the updates as seen from an origin near them, `[n, n]`.

    The origin is zero, the global weights, near which updates are. Where the distance of two is a
    thousandth or less of their norms, it would cancel in float64, and the origin is a value from
    the middle of every coordinate instead: not the mean, which a single far client would carry
    off. Memory is that of a few copies of a part and a result a core, and of 32 results at most.

    Args:
        updates: of n clients, at least one.
    """
    gram = _gram_matrix(updates, centred=False)
    norms = np.diag(gram)[:, None] + np.diag(gram)
    near = norms - 2 * gram < 1e-6 * norms
    np.fill_diagonal(near, False)
    return _gram_matrix(updates, centred=True) if near.any() else gram


def _gram_matrix(updates: Sequence[Update], centred: bool) -> NDArray[np.float64]:
    n, scratch = len(updates), _Scratch()
    sums: list[NDArray[np.float64]] = []  # one a group, whatever the cores

    def add_up(
        pieces_of: Callable[[Part], Pieces], total: NDArray[np.float64], some: Sequence[Part]
    ) -> None:
        products = scratch.array("products", (n, n), np.float64)
        for part in some:
            values = scratch.rows(pieces_of(part), np.float64)
            if centred:
                values -= np.sort(values.T, axis=1)[:, n // 2]
            total += np.matmul(values, values.T, out=products)

    with _all_cores() as each:
        for parts, pieces_of in spans(updates, _to_multiply(updates)):
            groups = min(_GROUPS, len(parts))
            bounds = [len(parts) * group // groups for group in range(groups + 1)]
            some = [parts[first:last] for first, last in itertools.pairwise(bounds)]
            sums += [np.zeros((n, n)) for _ in range(len(sums), groups)]
            list(each(functools.partial(add_up, pieces_of), sums, some))
    return sum(sums, np.zeros((n, n)))


def squared_distances(updates: Sequence[Update]) -> NDArray[np.float64]:
    """Return the updates' squared distances from each other, infinite from themselves, `[n, n]`.

    ```
    ||x - y||^2 = (x - c).(x - c) + (y - c).(y - c) - 2 (x - c).(y - c)
    ```

    c is the origin of `gram_matrix`, so nothing cancels; memory is bounded as there.

    Args:
        updates: of n clients, at least one.
    """
    gram = gram_matrix(updates)
    squared_norms = np.diag(gram)
    squared = np.maximum(squared_norms[:, None] + squared_norms - 2 * gram, 0.0)
    np.fill_diagonal(squared, np.inf)
    return squared


def krum_scores(squared: NDArray[np.float64], byzantine: int) -> NDArray[np.float64]:
    """Return each update's sum of squared distances to its `n - byzantine - 2` nearest others.

    Source: P. Blanchard et al., NeurIPS 2017, https://arxiv.org/abs/1703.02757

    Args:
        squared: what `squared_distances` returns, or of it some rows and columns, `[n, n]`.
        byzantine: how many of the n may lie; at least one neighbour counts whatever it is.

    Returns:
        Scores, `[n]`, the smaller the better.
    """
    n = len(squared)
    nearest = min(max(1, n - byzantine - 2), n - 1)
    scores: NDArray[np.float64] = np.sort(squared, axis=1)[:, :nearest].sum(axis=1)
    return scores


def check_byzantine(byzantine: int | None) -> None:
    """Check a number of clients that may lie; None is as many as the rule withstands.

    Raises:
        UserError: it is neither None nor a whole number of at least 0.
    """
    if byzantine is not None and (type(byzantine) is not int or byzantine < 0):
        raise UserError(
            f"strategy.byzantine={byzantine}; expected a whole number of at least 0, "
            "or null for as many as the rule withstands"
        )


def withstood(byzantine: int | None, n: int, each: int) -> int:
    """Return how many of n clients may lie, for a rule that needs `each * byzantine + 3`.

    Args:
        byzantine: how many the user says; None: as many as n clients withstand.
        n: updates of the round.
        each: updates the rule needs for every one that may lie.

    Raises:
        UserError: n is too few.
    """
    if byzantine is None:
        return max(0, (n - 3) // each)
    least = each * byzantine + 3 if byzantine else 1
    if n < least:
        raise UserError(
            f"strategy.byzantine={byzantine} with {n} updates in a round; expected at "
            f"least {least}: raise clients_per_round (clients may fail) or lower byzantine"
        )
    return byzantine


@functools.cache
def _network(n: int, ranks: tuple[int, ...]) -> tuple[_Comparison, ...]:
    """Return the comparisons that bring the values of `ranks` among n to their places."""
    wanted, network = set(ranks), list[_Comparison]()
    for low, high in reversed(_merge_sort(n)):
        if {low, high} & wanted:
            network.append((low, high, low in wanted, high in wanted))
            wanted |= {low, high}
    return tuple(reversed(network))


def _merge_sort(n: int) -> list[tuple[int, int]]:
    """Return which two of n values are compared, one after the other, until all are in order.

    Source: K. E. Batcher, "Sorting Networks and their Applications", AFIPS 1968,
    https://doi.org/10.1145/1468075.1468121
    """
    pairs: list[tuple[int, int]] = []
    for power in range((n - 1).bit_length()):
        run = 2**power  # of values that are in order already
        for apart in (run >> halvings for halvings in range(power + 1)):
            for start in range(apart % run, n - apart, 2 * apart):
                lows = range(start, min(start + apart, n - apart))
                pairs += [
                    (i, i + apart) for i in lows if i // (2 * run) == (i + apart) // (2 * run)
                ]
    return pairs


def _compared(
    scratch: "_Scratch", pieces: Pieces, network: Sequence[_Comparison]
) -> list[NDArray[np.float32]]:
    """Return a part of every update once the comparisons of `network` are taken."""
    values = list(pieces)  # read only, or `own` of its place; `spare` is nobody's
    *own, spare = scratch.array("compared", (len(values) + 1, values[0].size), np.float32)
    for low, high, smaller, larger in network:
        one, other = values[low], values[high]
        if smaller and larger:
            values[low] = np.minimum(one, other, out=spare)
            values[high] = np.maximum(one, other, out=own[high])
            own[low], spare = spare, own[low]
        elif smaller:
            values[low] = np.minimum(one, other, out=own[low])
        else:
            values[high] = np.maximum(one, other, out=own[high])
    return values


def parts_of(updates: Sequence[Update], coordinates: int) -> list[Part]:
    """Return pieces of all layers, one after the other, of so many coordinates at most."""
    step = max(1, coordinates)
    return [
        (layer, slice(start, min(start + step, array.size)))
        for layer, array in enumerate(updates[0].delta)
        for start in range(0, array.size, step)
    ]


def _to_multiply(updates: Sequence[Update]) -> list[Part]:
    return parts_of(updates, max(_PART // len(updates), _LEAST))


def spans(
    updates: Sequence[Update], parts: Sequence[Part]
) -> Iterator[tuple[list[Part], Callable[[Part], Pieces]]]:
    """Yield all parts, some at a time, and what returns their pieces until the next are asked for.

    Where updates can be read (`Update.read`), the next parts are while these are worked on.
    """
    n, sizes = len(updates), [layer.size for layer in updates[0].delta]
    before = [0, *itertools.accumulate(sizes)]  # coordinates

    def bounds(part: Part) -> tuple[int, int]:
        layer, piece = part
        return before[layer] + piece.start, before[layer] + piece.stop

    length = max(1, _SPAN // n)
    cut = [list(some) for _, some in itertools.groupby(parts, lambda p: bounds(p)[0] // length)]
    if updates[0].read is None or not cut:
        for span in cut:
            yield span, functools.partial(_pieces, updates)
        return
    ranges = [
        (bounds(span[0])[0] // _BLOCK * _BLOCK, -(-bounds(span[-1])[1] // _BLOCK) * _BLOCK)
        for span in cut
    ]
    longest = max(end - begin for begin, end in ranges)
    buffers = [_pages(n, longest), _pages(n, longest)]

    def read(place: int, first: int) -> None:
        begin, end = ranges[place]
        for update, row in zip(
            updates[first::_READERS], buffers[place % 2][first::_READERS], strict=True
        ):
            assert update.read is not None
            update.read(begin, row[: end - begin])

    def pieces_of(place: int, part: Part) -> Pieces:
        first, last = (bound - ranges[place][0] for bound in bounds(part))
        return list(buffers[place % 2][:, first:last])

    with ThreadPoolExecutor(_READERS) as readers:

        def begin_to_read(place: int) -> list[Future[None]]:
            return [readers.submit(read, place, first) for first in range(_READERS)]

        ahead = begin_to_read(0)
        for place, span in enumerate(cut):
            for each in ahead:
                each.result()
            if place + 1 < len(cut):
                ahead = begin_to_read(place + 1)
            yield span, functools.partial(pieces_of, place)


def _pages(rows: int, columns: int) -> NDArray[np.float32]:
    """Return an array that begins where a page of memory does."""
    pages = mmap.mmap(-1, 4 * rows * columns, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, np.float32).reshape(rows, columns)


def _pieces(updates: Sequence[Update], part: Part) -> Pieces:
    """Return a part of every update, `[coordinates]` each."""
    return [update.delta[part[0]].reshape(-1)[part[1]] for update in updates]


class _Scratch(threading.local):
    """A thread's arrays, kept from part to part: fresh memory costs more than the arithmetic."""

    def __init__(self) -> None:
        self._kept: dict[str, NDArray[Any]] = {}

    def array(self, name: str, shape: tuple[int, int], dtype: Any) -> NDArray[Any]:
        """Return an array of whatever values, overwritten when `name` is asked for again."""
        size, kept = shape[0] * shape[1], self._kept.get(name)
        if kept is None or kept.size < size or kept.dtype != dtype:
            kept = self._kept[name] = np.empty(size, dtype)
        return kept[:size].reshape(shape)

    def rows(self, pieces: Pieces, dtype: Any) -> NDArray[Any]:
        """Return a copy of a part of every update, `[n, coordinates]`."""
        values = self.array("rows", (len(pieces), pieces[0].size), dtype)
        for row, piece in zip(values, pieces, strict=True):
            row[:] = piece
        return values


def _by_part(
    updates: Sequence[Update],
    made: Callable[[_Scratch, Pieces], NDArray[np.floating[Any]]],
    parts: Sequence[Part],
) -> Weights:
    """Return the layers whose `parts` are `made`, on all cores."""
    layers = [np.empty(layer.shape, np.float32) for layer in updates[0].delta]
    scratch = _Scratch()

    def fill(pieces_of: Callable[[Part], Pieces], part: Part) -> None:
        layer, piece = part
        layers[layer].reshape(-1)[piece] = made(scratch, pieces_of(part))

    with _all_cores() as each:
        for some, pieces_of in spans(updates, parts):
            list(each(functools.partial(fill, pieces_of), some))
    return layers


@contextlib.contextmanager
def _all_cores() -> Iterator[Callable[..., Iterator[Any]]]:
    """Yield a `map` that works on all cores: NumPy lets go of the interpreter in long loops."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield pool.map

"""What the robust rules share, no strategy itself.

The updates coordinate by coordinate, their distances, Krum's scores, how many clients may lie.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from femfed import UserError
from femfed.strategies.base import Update

_PART = 2**18  # values handled at a time


def columns(
    updates: Sequence[Update],
) -> Iterator[tuple[int, slice, NDArray[np.float32]]]:
    """Yield the updates side by side, part by part.

    Values of one coordinate lie together, in a copy of at most 2^18 values (or one coordinate of
    all clients) that is small enough for the processor's cache: memory grows neither with the
    model nor with the clients.

    Args:
        updates: of n clients, at least one.

    Yields:
        A layer's number, a slice of that layer flattened, and that part of the updates,
        `[coordinates, n]`, clients in the order given. The array is the caller's to overwrite.
    """
    step = max(1, _PART // len(updates))
    for layer, arrays in enumerate(zip(*(update.delta for update in updates), strict=True)):
        rows = [array.reshape(-1) for array in arrays]
        for start in range(0, rows[0].size, step):
            part = slice(start, start + step)
            yield layer, part, np.stack([row[part] for row in rows], axis=1)


def gram_matrix(updates: Sequence[Update]) -> NDArray[np.float64]:
    """Return the inner products of the updates' differences from their middle, `[n, n]`.

    The origin is a value from the middle of every coordinate, not the mean, which a single far
    client would carry off: honest updates stay near it, and nothing of their distances cancels in
    float64. Besides the result, memory is that of a few copies of a part.

    Args:
        updates: of n clients, at least one.
    """
    gram = np.zeros((len(updates), len(updates)))
    for _, _, values in columns(updates):
        middle = np.sort(values, axis=1)[:, len(updates) // 2, None]
        centred = values - middle.astype(np.float64)
        gram += centred.T @ centred
    return gram


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

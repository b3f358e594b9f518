"""Other partitions than the natural one: the same images, dealt out to the clients anew.

What writers change is seen against the same run without writers. So a partition keeps everything
else: the clients' training images are pooled and dealt out again, and so are their held-out images;
the writers who never train stay who they are.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from femfed import UserError
from femfed.data.source import Dataset
from femfed.data.store import CLASSES, Columns, Rows, View, WriterStore, viewed
from femfed.seeds import generator

GROUP = 100  # clients that share a shard number, as in LEAF


def partition(
    dataset: Dataset,
    store: WriterStore,
    clients: NDArray[np.int64],
    unseen: NDArray[np.int64],
    test_fraction: float,
    seed: int,
) -> WriterStore:
    """Return `len(clients)` new clients that share out the images of `clients`, then `unseen`.

    ```
    iid        a random permutation; client i has as many images as writer i had
    dirichlet  p_i ~ Dirichlet(alpha * p), p the labels' shares of all images; client i draws as
               many images as writer i had, each with label ~ p_i, without replacement; a label
               that is used up is left out and p_i renormalised
    shards     images sorted by label, cut into clients * shards equal pieces, each client `shards`
    ```

    Held-out images are dealt in the same way, with the same p_i and the same pieces.

    Source: `shards`: B. McMahan et al., "Communication-Efficient Learning of Deep Networks from
    Decentralized Data", AISTATS 2017, https://arxiv.org/abs/1602.05629; `dirichlet`: T.-M. H. Hsu,
    H. Qi, M. Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
    Classification", 2019, https://arxiv.org/abs/1909.06335 (there, all clients are of one size).

    Args:
        dataset: which partition, with its `alpha` or `shards`.
        store: the writers.
        clients: which of them train.
        unseen: which of them never do.
        test_fraction: share of a writer's images held out where no split is published.
        seed: seed of the run.
    """
    key = {
        "partition": dataset.partition,
        **({"alpha": dataset.alpha} if dataset.partition == "dirichlet" else {}),
        **({"shards": dataset.shards} if dataset.partition == "shards" else {}),
        "clients": clients.tolist(),
        "unseen": unseen.tolist(),
        "test_fraction": test_fraction,
        "seed": seed,
    }

    def regroup() -> View:
        train, test = [], []
        for index in clients.tolist():
            writer, rows = store.writer(index, test_fraction, seed), store.rows_of(index)
            train.append(rows[writer.train])
            test.append(rows[writer.test])
        pieces, images = len(clients) * dataset.shards, sum(map(len, train))
        if dataset.partition == "shards" and pieces > images:
            raise UserError(
                f"dataset.shards={dataset.shards}: {len(clients):,} clients would share out "
                f"{pieces:,} pieces of {images:,} training images; expected at most "
                f"{images // len(clients)} a client; lower dataset.shards"
            )
        columns, parts = Columns(), []
        dealt = _deal(dataset, store.labels, train, test, seed)
        for client, (own, held_out) in enumerate(dealt):
            shard, subject = divmod(client, GROUP)
            columns.names.append(f"{dataset.partition}_{client:04d}")
            columns.numbers.append(shard)
            columns.subject_numbers.append(subject)
            columns.examples.append(len(own) + len(held_out))
            columns.train_examples.append(len(own))
            columns.apart.append(False)
            parts += [np.sort(own), np.sort(held_out)]
        for index in unseen.tolist():
            rows = store.rows_of(index)
            columns.copy(store, index, len(rows), -1)
            columns.apart[-1] = True
            parts.append(rows)
        return columns, np.concatenate(parts)

    return viewed(store, key, regroup)


def _deal(
    dataset: Dataset, labels: NDArray[np.uint8], train: list[Rows], test: list[Rows], seed: int
) -> list[tuple[Rows, Rows]]:
    """Return each client's rows to train on and rows held out; `train` and `test` are by writer."""
    random = generator(seed, "partition")
    pools = [random.permutation(np.concatenate(part)) for part in (train, test)]
    sizes = [np.array([len(rows) for rows in part]) for part in (train, test)]
    if dataset.partition == "iid":
        dealt = [
            np.split(pool, np.cumsum(size)[:-1]) for pool, size in zip(pools, sizes, strict=True)
        ]
    elif dataset.partition == "shards":
        deal = random.permutation(len(train) * dataset.shards).reshape(len(train), -1)
        dealt = [_by_pieces(pool, labels, deal) for pool in pools]
    else:
        counts = np.bincount(labels[np.concatenate(pools)], minlength=CLASSES)
        present = np.flatnonzero(counts)
        shares = np.zeros((len(train), CLASSES))
        alpha = dataset.alpha * counts[present] / counts.sum()
        shares[:, present] = _dirichlet(random, alpha, len(train))
        dealt = [
            _by_shares(pool, labels, size, shares, random)
            for pool, size in zip(pools, sizes, strict=True)
        ]
    return list(zip(*dealt, strict=True))


def _by_pieces(pool: Rows, labels: NDArray[np.uint8], deal: NDArray[np.int64]) -> list[Rows]:
    """Cut `pool`, sorted by label, into as many pieces as `deal` names, and deal them."""
    ordered = pool[np.argsort(labels[pool], kind="stable")]
    pieces = np.array_split(ordered, deal.size)
    return [np.concatenate([pieces[piece] for piece in own]) for own in deal]


def _dirichlet(random: np.random.Generator, alpha: NDArray[Any], size: int) -> NDArray[np.float64]:
    """Draw `[size, classes]` shares; gammas so small that all are 0 become a single label."""
    gammas = random.standard_gamma(alpha, (size, len(alpha)))
    alone = random.choice(len(alpha), size, p=alpha / alpha.sum())
    empty = gammas.sum(axis=1) == 0
    gammas[empty, alone[empty]] = 1.0
    shares: NDArray[np.float64] = gammas / gammas.sum(axis=1, keepdims=True)
    return shares


def _by_shares(
    pool: Rows,
    labels: NDArray[np.uint8],
    sizes: NDArray[np.int64],
    shares: NDArray[np.float64],
    random: np.random.Generator,
) -> list[Rows]:
    """Give client i `sizes[i]` rows whose labels are drawn from `shares[i]`, as far as they last.

    The clients take their turns in a random order, so that none is always the one who finds its
    labels used up.
    """
    stacks = [pool[labels[pool] == label] for label in range(CLASSES)]
    left = np.array([len(stack) for stack in stacks])
    own: list[Rows] = [np.empty(0, np.int32) for _ in sizes]
    for client in random.permutation(len(sizes)).tolist():
        taken = np.zeros(CLASSES, np.int64)
        while (wanted := int(sizes[client] - taken.sum())) > 0:
            share = np.where(left > taken, shares[client], 0.0)
            if not share.sum():  # all of its labels are used up: take of what is left
                share = (left - taken).astype(np.float64)
            taken += random.multinomial(wanted, share / share.sum())
            np.minimum(taken, left, out=taken)
        left -= taken
        own[client] = np.concatenate(
            [stacks[label][left[label] : left[label] + taken[label]] for label in range(CLASSES)]
        )
    return own

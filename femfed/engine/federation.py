"""Who takes part: the clients, the writers who never train, and the images each of them has."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from femfed import UserError
from femfed.data.partition import partition
from femfed.data.source import Dataset
from femfed.data.store import WriterStore
from femfed.seeds import generator

Writers = NDArray[np.int64]


@dataclass(frozen=True)
class Federation:
    """Which writers take part.

    Attributes:
        clients: writer of each client, `[clients]`; client i is always the same writer.
        unseen: writers who never train and are only evaluated.
    """

    clients: Writers
    unseen: Writers


def draw_federation(
    seed: int, trainable: Writers, apart: Writers, clients: int, unseen_fraction: float
) -> Federation:
    """Draw the clients from the front and the unseen writers from the back of one permutation.

    So on the same writers a smaller federation is a part of a larger one, and the unseen writers
    stay the same however many clients there are (as long as enough writers are left). Writers whom
    the dataset itself keeps apart come first: at least one of them is unseen, and others are only
    if there are too few of them.

    Args:
        seed: seed of the run.
        trainable: the dataset's writers that have images to train on.
        apart: writers that the dataset keeps apart from those who train.
        clients: writers in the federation.
        unseen_fraction: writers that never train, as a share of the trainable ones.

    Raises:
        UserError: there are fewer writers than clients.
    """
    if clients > len(trainable):
        raise UserError(
            f"clients={clients}, but the dataset has {len(trainable)} writers; "
            f"expected clients <= {len(trainable)}"
        )
    order = generator(seed, "federation").permutation(trainable)
    others = np.concatenate([order[clients:], generator(seed, "unseen").permutation(apart)])
    unseen = round(unseen_fraction * len(trainable))
    if unseen_fraction and len(apart):
        unseen = max(unseen, 1)
    unseen = min(unseen, len(others))
    return Federation(order[:clients], others[len(others) - unseen :])


def open_federation(
    dataset: Dataset,
    cache: Path,
    clients: int,
    seed: int,
    unseen_fraction: float,
    test_fraction: float,
    on_status: Callable[[str], None],
    on_message: Callable[[str], None],
) -> tuple[WriterStore, Federation]:
    """Return the images of all writers and who of them takes part.

    Args:
        dataset: where the writers come from and what is kept of them.
        cache: folder of all stores.
        clients: writers in the federation.
        seed: seed of the run.
        unseen_fraction: writers that never train, as a share of those who could.
        test_fraction: share of a writer's images held out where no split is published.
        on_status: told what is going on.
        on_message: told what is to be known: counts that differ from the published ones.

    Raises:
        UserError: the dataset is not what it should be, or has fewer writers than clients.
    """
    on_status(f"opening the dataset {dataset.name}")
    wanted = round(clients / (1 - unseen_fraction))
    total = dataset.writers_made(wanted)
    of = f" of {total:,}" if total else ""
    everything = dataset.convert(
        cache,
        wanted,
        lambda count: None if count % 200 else on_status(f"converting: {count:,}{of} writers"),
    )
    for line in dataset.remarks(everything):
        on_message(line)
    store = dataset.select(everything)
    trainable = np.flatnonzero(~store.apart & (store.train_examples != 0))
    apart = np.flatnonzero(store.apart)
    federation = draw_federation(seed, trainable, apart, clients, unseen_fraction)
    unseen = round(unseen_fraction * len(trainable))
    if len(apart) and unseen_fraction:
        both = int(np.isin(federation.unseen, apart).sum())
        on_message(
            f"{len(apart):,} writers are kept apart by the source; {both:,} of them are evaluated "
            "as unseen writers (evaluate.unseen_fraction)"
        )
    if len(federation.unseen) < unseen:
        on_message(
            f"{len(federation.unseen)} unseen writers instead of {unseen}: "
            f"clients={clients} of {len(store)} writers leaves no more"
        )
    if dataset.partition == "writer":
        return store, federation
    store = partition(dataset, store, federation.clients, federation.unseen, test_fraction, seed)
    everyone = np.arange(len(store))
    return store, Federation(everyone[:clients], everyone[clients:])

"""What a dataset holds: `python -m femfed.data dataset=leaf dataset.path=DIR`.

Takes the command line of `simulate.py`; prints a table and writes a contact sheet to `outputs/`.
Of the natural partition all writers are counted, of any other the clients of that run.
"""

import sys
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from femfed import (
    UserError,
    command_line,
    config,
    escape_unencodable,
    one_line,
    print_quietly,
)
from femfed.data.overview import overview, sheet, table
from femfed.data.source import Dataset
from femfed.data.store import WriterStore
from femfed.engine.federation import Writers, open_federation
from femfed.report.sheet import draw_sheet

SHOWN = 24  # writers on the contact sheet


def main(arguments: list[str]) -> int:
    """Describe the dataset of a command line; return the exit code."""
    escape_unencodable()
    try:
        if {"-h", "--help"} & set(arguments):
            print_quietly(__doc__)
            return 0
        line = command_line.parse(arguments)
        if others := [option[0] for option in line.options if option[0] != "--config-dir"]:
            raise UserError(f"{others[0]}: one dataset is described; expected no {others[0]}")
        cfg = config.compose(line)
        dataset = config.make(cfg.dataset, "dataset")
        store, members, remarks = writers_of(dataset, cfg)
    except UserError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}; give another folder, cache=DIR", file=sys.stderr)
        return 2
    variant = dataset.variant_of(store)
    published = int((store.train_examples[members] >= 0).sum())
    lines = [
        *table(variant, overview(store, members)),
        ("partition", dataset.partition),
        (
            "split",
            f"as published for {published:,} of these writers; of the others "
            f"{cfg.evaluate.test_fraction:.0%} is held out by the seed",
        ),
        ("kept apart", f"{int(store.apart.sum()):,} writers who never train"),
        ("store", str(store.folder)),
        *(("note", remark) for remark in remarks),
    ]
    path = Path("outputs") / f"{dataset.name.split()[0]}_{dataset.partition}.png"
    shown = members[np.linspace(0, len(members) - 1, min(SHOWN, len(members))).astype(int)]
    names = [store.names[index] for index in shown]
    title = f"{variant}, partition {dataset.partition}: {len(shown)} of {len(members)}"
    try:
        path.parent.mkdir(exist_ok=True)
        path = draw_sheet(path, title, names, sheet(store, shown), store.folder.name)
    except OSError as error:
        place = one_line(str(path.parent.absolute()))
        print(f"error: {place}: {error.strerror}; work in a folder of yours", file=sys.stderr)
        return 2
    lines.append(("contact sheet", str(path)))
    try:
        print_quietly("\n".join(one_line(f"{name:18}{value}") for name, value in lines))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def writers_of(dataset: Dataset, cfg: DictConfig) -> tuple[WriterStore, Writers, list[str]]:
    """Return the store, who of it is described, and what is to be noted."""
    cache, remarks = Path(cfg.cache).expanduser(), list[str]()
    if dataset.partition == "writer":
        everything = dataset.convert(cache, cfg.clients)
        store = dataset.select(everything)
        return store, np.arange(len(store)), dataset.remarks(everything)
    store, federation = open_federation(
        dataset,
        cache=cache,
        clients=cfg.clients,
        seed=cfg.seed,
        unseen_fraction=cfg.evaluate.unseen_fraction,
        test_fraction=cfg.evaluate.test_fraction,
        on_status=lambda line: None,
        on_message=remarks.append,
    )
    return store, federation.clients, remarks


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

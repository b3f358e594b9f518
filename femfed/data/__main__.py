"""What a dataset holds: `python -m femfed.data dataset=leaf dataset.path=DIR`.

Takes the command line of `simulate.py`; prints a table of the clients of that run and writes a
contact sheet of their handwriting to `outputs/`.
"""

import sys
from pathlib import Path

import numpy as np

from femfed import UserError, config
from femfed.data.overview import overview, sheet, table
from femfed.engine.federation import open_federation
from femfed.report.sheet import draw_sheet

SHOWN = 24  # writers on the contact sheet


def main(arguments: list[str]) -> int:
    """Describe the dataset of a command line; return the exit code."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    try:
        cfg = config.compose(arguments)
        dataset = config.make(cfg.dataset, "dataset")
        remarks: list[str] = []
        store, federation = open_federation(
            dataset,
            cache=Path(cfg.cache).expanduser(),
            clients=cfg.clients,
            seed=cfg.seed,
            unseen_fraction=cfg.evaluate.unseen_fraction,
            test_fraction=cfg.evaluate.test_fraction,
            on_status=lambda line: print(line, file=sys.stderr),
            on_message=remarks.append,
        )
        clients = np.sort(federation.clients)
        lines = table(dataset.variant, overview(store, clients))
        published = int((store.train_examples[clients] >= 0).sum())
        lines += [
            ("partition", dataset.partition),
            (
                "split",
                f"as published for {published:,} of the writers; of the others "
                f"{cfg.evaluate.test_fraction:.0%} is held out by the seed",
            ),
            ("unseen writers", f"{len(federation.unseen):,}"),
            ("of the dataset", f"{len(store):,} writers in {store.folder}"),
            *(("note", remark) for remark in remarks),
        ]
        for name, value in lines:
            print(f"{name:18}{value}")
        path = Path("outputs") / f"{dataset.name.split()[0]}_{dataset.partition}.png"
        path.parent.mkdir(exist_ok=True)
        shown = clients[np.linspace(0, len(clients) - 1, min(SHOWN, len(clients))).astype(int)]
        names = [store.names[index] for index in shown]
        draw_sheet(
            path,
            f"{dataset.variant}: {len(shown)} of {len(clients)} clients",
            names,
            sheet(store, shown),
        )
        print(f"{'contact sheet':18}{path}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Draw the accuracy curves of sweeps over `precision` and `seed`, one panel a sweep.

    python -m benchmarks.precision docs/bfloat16_curves.png SWEEP [SWEEP]

A line is the mean over the seeds, its band their range. Prints the final accuracy of every run.
"""

import argparse
import csv
import json
from collections import defaultdict
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("agg")
import matplotlib.pyplot as plt


def curves(sweep: Path) -> tuple[str, dict[str, list[list[float]]]]:
    """Return a sweep's dataset and model, and by precision the accuracies of each seed's rounds."""
    found, title = defaultdict(list), ""
    for path in sorted(sweep.glob("*/summary.json")):
        summary = json.loads(path.read_text())
        rows = csv.DictReader(path.with_name("rounds.csv").read_text().splitlines())
        accuracy = [100 * float(row["test_accuracy"]) for row in rows if int(row["round"])]
        found[summary["precision"]].append(accuracy)
        title = f"{summary['variant'] or summary['dataset']}, {summary['model']}"
        print(f"{title}  {summary['precision']:<9} seed {summary['seed']}  {accuracy[-1]:.1f} %")
    return title, found


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path)
    parser.add_argument("sweeps", type=Path, nargs="+")
    options = parser.parse_args()
    count = len(options.sweeps)
    figure, panels = plt.subplots(1, count, figsize=(5 * count, 3.6), squeeze=False)
    for panel, sweep in zip(panels[0], options.sweeps, strict=True):
        title, found = curves(sweep)
        for precision, colour, line in (
            ("float32", "tab:blue", "-"),
            ("bfloat16", "tab:orange", "--"),
        ):
            runs = np.array(found[precision])
            rounds = np.arange(1, runs.shape[1] + 1)
            panel.plot(rounds, runs.mean(axis=0), line, color=colour, label=precision)
            panel.fill_between(rounds, runs.min(axis=0), runs.max(axis=0), color=colour, alpha=0.2)
        panel.set(title=title, xlabel="round", ylabel="accuracy on held-out images (%)")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.legend(title=f"mean and range of {len(runs)} seeds", loc="lower right")
    figure.tight_layout()
    figure.savefig(options.picture, dpi=110)


if __name__ == "__main__":
    main()

"""The whole of LEAF's FEMNIST into the store: seconds, memory, and how long it takes to open.

    python -m benchmarks.convert [WRITERS]

Writes as many shards as LEAF's 3,597 writers fill (some 5 GB below the temporary folder, removed
afterwards) with the images of 100 synthetic writers over and over, and converts them.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from femfed.data.glyphs import draw_writer
from femfed.data.store import WriterStore

WRITERS, PER_SHARD = 3_597, 100
PIXELS = [json.dumps(value / 255) for value in range(256)]

CONVERT = """
import sys, time
from pathlib import Path
from femfed import config
from femfed.engine.footprint import peak_memory
cfg = config.compose(["dataset=leaf", f"dataset.path={sys.argv[1]}"])
start = time.perf_counter()
store = config.make(cfg.dataset, "dataset").convert(Path(sys.argv[2]), 0)
seconds = time.perf_counter() - start
peak = peak_memory() / 2**20
print(f"{len(store):,} writers, {store.offsets[-1]:,} images")
print(f"converted in {seconds:.1f} s, peak memory {peak:.0f} MiB")
"""


def main() -> None:
    """Write, convert, open."""
    writers = int(sys.argv[1]) if len(sys.argv) > 1 else WRITERS
    with tempfile.TemporaryDirectory(prefix="femfed-convert-") as folder:
        source, cache = Path(folder) / "leaf", Path(folder) / "cache"
        write(source, writers)
        size = sum(file.stat().st_size for file in source.rglob("*.json"))
        print(f"{size / 1e9:.1f} GB of JSON")
        subprocess.run([sys.executable, "-c", CONVERT, str(source), str(cache)], check=True)
        (made,) = cache.iterdir()
        start = time.perf_counter()
        store = WriterStore.open(made)
        opened = time.perf_counter()
        for index in range(len(store)):
            store.writer(index, 0.1, seed=0)
        each = (time.perf_counter() - opened) / len(store)
        print(f"opened in {1000 * (opened - start):.1f} ms, {1e6 * each:.0f} us a writer and split")


def write(folder: Path, writers: int) -> None:
    """Write `writers` as LEAF's train/ and test/ shards."""
    people = []
    for writer in range(PER_SHARD):
        labels, images = draw_writer(0, writer)
        rows = [f"[{', '.join(map(PIXELS.__getitem__, image.tobytes()))}]" for image in images]
        people.append((labels.tolist(), rows))
    for shard, start in enumerate(range(0, writers, PER_SHARD)):
        names = [f"f{i:04d}_00" for i in range(start, min(start + PER_SHARD, writers))]
        for half in ("train", "test"):
            file = folder / half / f"all_data_{shard}_niid_0_keep_0_{half}_9.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("w") as stream:
                cuts = [9 * len(labels) // 10 for labels, _ in people]
                parts = [
                    (labels[:cut], rows[:cut]) if half == "train" else (labels[cut:], rows[cut:])
                    for cut, (labels, rows) in zip(cuts, people, strict=True)
                ]
                counts = [len(labels) for labels, _ in parts[: len(names)]]
                stream.write(f'{{"users": {json.dumps(names)}, "num_samples": {counts}, ')
                stream.write('"user_data": {')
                for place, (name, (labels, rows)) in enumerate(zip(names, parts, strict=False)):
                    stream.write(f'{", " if place else ""}"{name}": ')
                    stream.write(f'{{"x": [{", ".join(rows)}], "y": {labels}}}')
                stream.write("}}")


if __name__ == "__main__":
    main()

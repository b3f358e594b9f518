"""The pattern of Flower's TensorFlow quickstart: every client message builds a model and fits it.

    python -m benchmarks.quickstart MODEL CLIENTS ROUNDS CPUS

Prints the seconds of each round after the first as a JSON list. CPUS=2 is Flower's default: an
actor for every two cores, with TensorFlow's own threads. CPUS=1 suits it better on few cores: an
actor for every core, with one TensorFlow thread. Neither evaluates.
"""

import json
import logging
import os
import sys
import time
from typing import Any

os.environ.update(RAY_worker_niceness="0")  # as our workers: Ray's 15 lets every program go first

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from benchmarks.bench import CORES, EXAMPLES, LOCAL, MODELS

client_app = ClientApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Build, load, fit, reply."""
    import keras

    keras.backend.clear_session()
    config = message.content.config_records["config"]
    model = MODELS[str(config["model"])].build(0)
    model.compile(
        keras.optimizers.SGD(LOCAL.learning_rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.set_weights(message.content.array_records["arrays"].to_numpy_ndarrays())
    draw = np.random.default_rng(0)
    images = draw.random((EXAMPLES, 28, 28, 1), dtype=np.float32)
    labels = draw.integers(62, size=EXAMPLES)
    history = model.fit(images, labels, batch_size=LOCAL.batch_size, epochs=1, verbose=0)
    metrics = MetricRecord({"num-examples": EXAMPLES, "loss": history.history["loss"][-1]})
    content = RecordDict({"arrays": ArrayRecord(model.get_weights()), "metrics": metrics})
    return Message(content, reply_to=message)


def main(model: str, clients: int, rounds: int, cpus: int) -> list[float]:
    """Return the seconds of each round but the first."""
    if cpus > 1:  # femfed has set one thread for this process and its workers
        for name in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
            del os.environ[name]
    from flwr.app import ConfigRecord
    from flwr.simulation import run_simulation

    ends: list[float] = []
    server_app = ServerApp()

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=clients)
        strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(MODELS[model].build(0).get_weights()),
            num_rounds=rounds + 1,
            train_config=ConfigRecord({"model": model}),
            evaluate_fn=lambda round, arrays: ends.append(time.perf_counter()),
        )

    logging.getLogger("flwr").setLevel(logging.ERROR)
    resources = {"num_cpus": cpus, "num_gpus": 0.0}
    start = {"num_cpus": CORES, "log_to_driver": False}
    setting: Any = {"client_resources": resources, "init_args": start}
    run_simulation(server_app, client_app, clients, backend_config=setting)
    return list(np.diff(ends)[1:])


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], *map(int, sys.argv[2:]))))

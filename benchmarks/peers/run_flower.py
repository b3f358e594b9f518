"""Flower's TensorFlow quickstart: every client message builds a Keras model and fits it.

https://flower.ai/docs/framework/tutorial-quickstart-tensorflow.html. SETTING is the CPUs of a
client: 2 is Flower's default, an actor for every two cores with TensorFlow's own threads; 1 suits
it better on few cores, an actor for every core with one TensorFlow thread. Neither evaluates, and
the images are drawn instead of downloaded.
"""

import logging
import os

import protocol

name, clients, cores, cpus = protocol.arguments()
os.environ.update(FLWR_TELEMETRY_ENABLED="0", RAY_USAGE_STATS_ENABLED="0", TF_CPP_MIN_LOG_LEVEL="3")
os.environ.update(RAY_worker_niceness="0")  # Ray's 15 would let every other program go first
if cpus == "1":
    os.environ.update(TF_NUM_INTRAOP_THREADS="1", TF_NUM_INTEROP_THREADS="1")

from flwr.app import (  # noqa: E402
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp  # noqa: E402
from flwr.serverapp import Grid, ServerApp  # noqa: E402
from flwr.serverapp.strategy import FedAvg  # noqa: E402
from flwr.simulation import run_simulation  # noqa: E402

client_app = ClientApp()
server_app = ServerApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Build, load, fit, reply."""
    import keras
    import keras_models

    keras.backend.clear_session()
    model = keras_models.build(str(message.content.config_records["config"]["model"]))
    model.compile(
        keras.optimizers.SGD(protocol.LEARNING_RATE),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.set_weights(message.content.array_records["arrays"].to_numpy_ndarrays())
    ((images, labels),) = protocol.writers(1)
    history = model.fit(images[..., None], labels, batch_size=protocol.BATCH, epochs=1, verbose=0)
    metrics = MetricRecord({"num-examples": len(labels), "loss": history.history["loss"][-1]})
    content = RecordDict({"arrays": ArrayRecord(model.get_weights()), "metrics": metrics})
    return Message(content, reply_to=message)


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    """Train as many rounds as are asked for."""
    import keras_models

    asked = protocol.rounds("flwr", "tensorflow")

    def after_round(round: int, arrays: ArrayRecord) -> None:
        if next(asked, None) is None:
            os._exit(0)  # the driver ends Ray

    strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=clients)
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(keras_models.build(name).get_weights()),
        num_rounds=1 << 30,
        train_config=ConfigRecord({"model": name}),
        evaluate_fn=after_round,  # also before round 1
    )


if __name__ == "__main__":
    logging.getLogger("flwr").setLevel(logging.ERROR)
    resources = {"num_cpus": int(cpus), "num_gpus": 0.0}
    start = {"address": "local", "num_cpus": cores, "log_to_driver": False}
    setting = {"client_resources": resources, "init_args": start}
    run_simulation(server_app, client_app, clients, backend_config=setting)

"""pfl-research with TensorFlow: `FederatedAveraging` on its `SimulatedBackend`, a process per core.

https://apple.github.io/pfl-research/tutorials/index.html; several processes as its
`GenericPlatform` documents, by PFL_WORKER_RANK and PFL_WORKER_ADDRESSES. One thread each, which is
faster on few cores than threads. Keras 2, because pfl keys weights by name.
"""

import os

os.environ.update(
    TF_USE_LEGACY_KERAS="1",
    TF_NUM_INTRAOP_THREADS="1",
    TF_NUM_INTEROP_THREADS="1",
    TF_CPP_MIN_LOG_LEVEL="3",
)

import protocol
import run_pfl

run_pfl.one_process_per_core()  # before pfl is imported

import keras_models  # noqa: E402
import tensorflow as tf  # noqa: E402
from pfl.model.tensorflow import TFModel  # noqa: E402  # before any other use of TensorFlow

if __name__ == "__main__":
    name, clients, _, _ = protocol.arguments()
    tf.random.set_seed(0)
    layers = keras_models.build(name)
    layers.compile(
        optimizer=tf.keras.optimizers.SGD(protocol.LEARNING_RATE),
        loss=tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model = TFModel(
        layers,
        metrics={"accuracy": tf.keras.metrics.SparseCategoricalAccuracy()},
        central_optimizer=tf.keras.optimizers.SGD(1.0),
    )
    assert len(model.variable_map) == len(layers.trainable_variables)
    data = {
        str(i): [tf.constant(x[..., None]), tf.constant(y)]
        for i, (x, y) in enumerate(protocol.writers(clients))
    }
    run_pfl.run(model, data, "tensorflow")

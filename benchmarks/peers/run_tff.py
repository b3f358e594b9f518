"""TensorFlow Federated: `build_weighted_fed_avg` in its default local runtime, with its threads.

https://www.tensorflow.org/federated/tutorials/federated_learning_for_image_classification
"""

import os

os.environ.update(TF_CPP_MIN_LOG_LEVEL="3")

import keras_models
import protocol
import tensorflow as tf
import tensorflow_federated as tff

if __name__ == "__main__":
    name, clients, _, _ = protocol.arguments()
    datasets = [
        tf.data.Dataset.from_tensor_slices((images[..., None], labels))
        .shuffle(protocol.EXAMPLES)
        .batch(protocol.BATCH)
        for images, labels in protocol.writers(clients)
    ]

    def model_fn() -> tff.learning.models.VariableModel:
        """Return a fresh model, as TFF asks for."""
        return tff.learning.models.from_keras_model(
            keras_models.build(name),
            input_spec=datasets[0].element_spec,
            loss=tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )

    process = tff.learning.algorithms.build_weighted_fed_avg(
        model_fn,
        client_optimizer_fn=tff.learning.optimizers.build_sgdm(protocol.LEARNING_RATE),
        server_optimizer_fn=tff.learning.optimizers.build_sgdm(1.0),
    )
    state = process.initialize()
    for _ in protocol.rounds("tensorflow-federated", "tensorflow"):
        state = process.next(state, datasets).state

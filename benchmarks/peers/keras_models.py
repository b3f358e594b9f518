"""The two models in Keras, for the contestants that use it: Keras 3, or 2 as `tf_keras`."""

from typing import Any

import protocol
from tensorflow import keras


def build(name: str) -> Any:
    """Return `femfed.models.CNN` or `PooledCNN` with the channels last."""
    layers = keras.layers
    if name == "cnn":
        stack = [
            layers.Conv2D(32, 3, activation="relu"),
            layers.Conv2D(64, 3, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Dropout(0.25),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dropout(0.5),
            layers.Dense(protocol.CLASSES),
        ]
    else:
        stack = [
            layers.Conv2D(32, 5, padding="same", activation="relu"),
            layers.MaxPooling2D(2),
            layers.Conv2D(64, 5, padding="same", activation="relu"),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(2048, activation="relu"),
            layers.Dense(protocol.CLASSES),
        ]
    model = keras.Sequential([keras.Input((28, 28, 1)), *stack])
    protocol.check(name, model.count_params())
    return model

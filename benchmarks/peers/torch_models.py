"""The two models in PyTorch, for the contestants that use it."""

import protocol
from torch import nn


def build(name: str) -> nn.Module:
    """Return `femfed.models.CNN` or `PooledCNN` as PyTorch writes them; channels come first."""
    if name == "cnn":
        model = nn.Sequential(
            nn.Conv2d(1, 32, 3),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout(0.25),
            nn.Flatten(),
            nn.Linear(12 * 12 * 64, 128),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(128, protocol.CLASSES),
        )
    else:
        model = nn.Sequential(
            nn.Conv2d(1, 32, 5, padding="same"),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding="same"),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(7 * 7 * 64, 2048),
            nn.ReLU(),
            nn.Linear(2048, protocol.CLASSES),
        )
    protocol.check(name, sum(parameter.numel() for parameter in model.parameters()))
    return model

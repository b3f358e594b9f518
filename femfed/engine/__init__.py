"""The engine: a pure round loop, and the Flower apps that carry it to the workers."""

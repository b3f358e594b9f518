"""What a worker imports, before Flower does: Ray imports this in processes that wait for work.

Flower's actor lies in a package that imports all of Flower's engine, and TensorFlow with its
pictures and tables, garbage collected in between: 1.7 times the time of what a worker needs.
"""

import contextlib
import importlib
import importlib.util
import sys

from femfed import PICTURES_AND_TABLES, light_imports

PACKAGE = "flwr.simulation"


def _preload() -> None:
    with light_imports(without=PICTURES_AND_TABLES):
        import femfed.client
        import femfed.engine.apps  # noqa: F401

        spec = importlib.util.find_spec(PACKAGE)
        if spec is not None and PACKAGE not in sys.modules:
            # As a package that imports nothing itself: whoever asks for it later gets Flower's.
            sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
            try:
                importlib.import_module(f"{PACKAGE}.ray_transport.ray_actor")
            finally:
                del sys.modules[PACKAGE]


with contextlib.suppress(Exception):  # costs time only: whoever needs it imports it again
    _preload()

"""What a worker imports, before Flower does: Ray imports this in processes that wait for work.

Flower's actor lies in a package that imports all of Flower's engine, and TensorFlow with its
pictures and tables, garbage collected in between: twice the time of what a worker needs.
"""

import contextlib
import importlib
import importlib.util
import sys

from femfed import PICTURES_AND_TABLES, light_imports

ENGINE = "flwr.simulation"


def _preload() -> None:
    with light_imports(without=PICTURES_AND_TABLES):
        spec = importlib.util.find_spec(ENGINE)
        if spec is not None and ENGINE not in sys.modules:
            # As a package that imports nothing itself: whoever asks for it later gets Flower's.
            sys.modules[ENGINE] = importlib.util.module_from_spec(spec)
            try:
                importlib.import_module(f"{ENGINE}.ray_transport.ray_actor")
            finally:
                del sys.modules[ENGINE]
        importlib.import_module("femfed.engine.apps")
        importlib.import_module("femfed.client")


with contextlib.suppress(Exception):  # is raised again, and told, where it is needed
    _preload()

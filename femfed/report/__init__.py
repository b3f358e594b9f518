"""What a run tells and leaves behind: tables, TensorBoard events, plots, the progress display.

Import from the modules: `plots` loads matplotlib, which takes half a second, so nothing here does.
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from femfed import drop_settings

# Figures have a canvas of their own: a notebook's backend, not installed here, is no error.
drop_settings(("MATPLOTLIBRC", "MPLBACKEND"))
logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns of settings that are not used


@contextlib.contextmanager
def drawing(settings: Any) -> Iterator[None]:
    """Draw in the block with matplotlib's own defaults but for `settings`, not with the user's."""
    import matplotlib

    defaults: Any = matplotlib.rcParamsDefault
    own = {key: value for key, value in defaults.items() if key != "backend"}
    with matplotlib.rc_context({**own, **settings}):
        yield

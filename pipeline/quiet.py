"""Ray Data without its own progress: jobs say how far they are in their own words."""

from __future__ import annotations

import logging

from ray.data import DataContext

_CHATTY = {
    "ray.data._internal.execution.streaming_executor": logging.WARNING,  # that an execution began and ended
    "ray.data._internal.progress": logging.ERROR,  # that there are no progress bars
}


def quiet_data() -> DataContext:
    """Silence Ray Data in this process, for the datasets that are made from here on; returns its settings.

    What it warns of is still said.
    """
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name, level in _CHATTY.items():
        logging.getLogger(name).setLevel(level)
    return context

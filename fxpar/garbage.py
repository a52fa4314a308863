"""garbage: Python's search for it while something is compiled."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

RARELY = 1_000_000, 50, 100
"""Thresholds of `gc.set_threshold`: a compiler makes many objects, few of them garbage, and a tenth of its time went to that."""

_inside = False


@contextlib.contextmanager
def few_collections() -> Iterator[None]:
    """Inside, Python looks for garbage rarely, and not at all among what was there before; at the end, once among what is new:
    now, and not in the middle of a step. Within another one it does nothing."""
    global _inside
    if _inside:
        yield
        return
    often, alone = gc.get_threshold(), gc.get_freeze_count() == 0
    _inside = True
    if alone:
        gc.freeze()
    if often[0]:
        gc.set_threshold(*map(max, often, RARELY))
    try:
        yield
        gc.collect()
    finally:
        gc.set_threshold(*often)
        if alone:
            gc.unfreeze()
        _inside = False

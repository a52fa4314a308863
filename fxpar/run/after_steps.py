"""after_steps: what objects want to be told of every optimizer's step, as long as they live."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

_told: weakref.WeakKeyDictionary[Any, Callable[[Any, Any], None]] = weakref.WeakKeyDictionary()


def after_steps(owner: Any, function: Callable[[Any, Any], None]) -> None:
    """As long as `owner` lives, ``function(owner, optimizer)`` is called behind every step of an optimizer of this process.

    `function` holds no reference to `owner`. The hook that torch knows of stays for ever: one that went with its owner would go
    whenever garbage is collected, and torch may be running over its hooks just then.
    """
    _told[owner] = function
    _listen()


@functools.cache
def _listen() -> None:
    register_optimizer_step_post_hook(_tell)


def _tell(optimizer: Any, *_: Any) -> None:
    for owner, function in [*_told.items()]:
        function(owner, optimizer)

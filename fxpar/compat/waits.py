"""waits: kernels of several graphs are compiled side by side.

Inductor hands the kernels of a graph to workers, and waits for them before it goes on to the next graph.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

from torch._guards import TracingContext, tracing

from fxpar.progress import stage

Wait = tuple[Any, dict[str, Any]]
"""The `AsyncCompile` that waits, and the namespace of the module whose kernels are waited for."""


@dataclass
class _Kept:
    """Code that is to be kept on disk. waits: for its kernels. context: that of its trace. how: arguments of `_save_graph`."""

    waits: list[Wait]
    context: Any
    how: tuple[Any, ...]


class _PutOff:
    """What is put off until all code was generated."""

    def __init__(self, wait: Callable[..., None], save: Callable[..., None]):
        """wait, save: what Inductor does at once, and goes on to do in other threads."""
        self._wait, self._save, self._thread = wait, save, threading.get_ident()
        self._waits: list[Wait] = []
        self._kept: list[_Kept] = []

    def wait(self, who: Any, scope: dict[str, Any]) -> None:
        if threading.get_ident() != self._thread:
            self._wait(who, scope)
            return
        self._waits.append((who, scope))

    def save(self, *how: Any) -> None:
        if threading.get_ident() != self._thread:
            self._save(*how)
            return
        self._kept.append(_Kept(self._waits, TracingContext.try_get(), how))
        self._waits = []

    def catch_up(self) -> None:
        from torch._inductor.triton_bundler import TritonBundler

        for kept in self._kept:
            TritonBundler.begin_compile()
            try:
                self._all(kept.waits)
                bundle, _ = TritonBundler.collect()
            finally:
                TritonBundler.end_compile()
            kept.how[1].set_triton_bundle(bundle)
            with tracing(kept.context):
                self._save(*kept.how)
        self._all(self._waits)

    def _all(self, waits: list[Wait]) -> None:
        for who, scope in waits:
            self._wait(who, scope)


def start_compilers() -> None:
    """Have the processes begin that compile Triton kernels for Inductor. That takes some seconds, and is not waited for;
    a kernel that is needed before is compiled here."""
    from torch._inductor.async_compile import AsyncCompile

    AsyncCompile.wakeup()


_later: _PutOff | None = None


@contextlib.contextmanager
def waiting_once() -> Iterator[None]:
    """Inside, code is generated without waiting for its kernels, and must not run; it is waited for at the end, and kept on disk.

    Within another one, of this thread or another, it does nothing.
    """
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codecache import FxGraphCache

    global _later
    if _later is not None:
        yield
        return
    later = _later = _PutOff(AsyncCompile.wait, FxGraphCache._save_graph)
    try:
        with (mock.patch.object(AsyncCompile, "wait", lambda who, scope: later.wait(who, scope)),
              mock.patch.object(FxGraphCache, "_save_graph", later.save)):
            yield
    finally:
        _later = None
    with stage("compiling kernels"):
        later.catch_up()

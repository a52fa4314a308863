"""`compat.waiting_once`: kernels of several graphs are waited for when all their code was generated."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._inductor import async_compile
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import FxGraphCache
from torch._inductor.triton_bundler import TritonBundler

from fxpar import compat


def graph(factor: float) -> fx.GraphModule:
    made = fx.Graph()
    x = made.placeholder("x")
    made.output((made.call_function(torch.ops.aten.sin.default, (made.call_function(torch.ops.aten.mul.Tensor, (x, factor)),)),))
    return fx.GraphModule(torch.nn.Module(), made)


@pytest.fixture
def events(monkeypatch, tmp_path) -> list[str]:
    """What happens, in order. Nothing is on disk yet."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    seen: list[str] = []
    wait, save = AsyncCompile.wait, FxGraphCache._save_graph
    monkeypatch.setattr(AsyncCompile, "wait", lambda *a: (seen.append("waits"), wait(*a)))
    monkeypatch.setattr(FxGraphCache, "_save_graph", lambda *a: (seen.append("saves"), save(*a)))
    return seen


def generate(factor: float, events: list[str]) -> Any:
    made = compat.compile_graph(graph(factor), [torch.ones(4)], {"fx_graph_cache": True})
    events.append("generated")
    return made


def test_code_is_waited_for_and_kept_when_all_was_generated(events):
    """`compat.waiting_once`: also within another one. All is right, and found again."""
    with compat.waiting_once():
        codes = [generate(2.0, events)]
        with compat.waiting_once():
            codes.append(generate(3.0, events))
        assert events == ["generated"] * 2
    assert events[2:] == ["waits", "saves"] * 2
    x = torch.rand(4)
    got: list[Tensor] = [code(x)[0] for code in codes]
    torch.testing.assert_close(got, [torch.sin(2 * x), torch.sin(3 * x)])
    torch.testing.assert_close(generate(3.0, events)(x)[0], got[1])
    assert events[6:] in (["generated"], ["waits", "generated"])  # loaded from disk, if it was not from memory


def test_outside_and_after_an_error_it_is_waited_for_at_once(events):
    """`compat.waiting_once`: what was put off by then is not done, as nobody has that code."""
    with pytest.raises(ZeroDivisionError), compat.waiting_once():
        generate(4.0, events)
        raise ZeroDivisionError
    assert events == ["generated"]
    generate(5.0, events)
    assert events[1:] == ["waits", "saves", "generated"]


def test_each_code_is_kept_with_its_own_kernels(events, monkeypatch, tmp_path):
    """`compat.waiting_once`: kernels that Triton compiled are a part of what Inductor keeps of each graph."""
    kernels = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "kernel.cubin").write_bytes(name.encode())
    monkeypatch.setattr("torch._inductor.triton_bundler.triton_cache_dir", lambda device: str(tmp_path))
    wait = AsyncCompile.wait

    def compiled(who: AsyncCompile, scope: dict[str, Any]) -> None:
        wait(who, scope)
        TritonBundler.put(("first", "second")[events.count("waits") - 1], 0)

    def kept(key: str, code: Any, *rest: Any) -> None:
        kernels.append([artifacts.kernel_hash for artifacts in code._triton_bundle.kernel_artifacts])

    monkeypatch.setattr(AsyncCompile, "wait", compiled)
    monkeypatch.setattr(FxGraphCache, "_save_graph", kept)
    with compat.waiting_once():
        generate(6.0, events)
        generate(7.0, events)
    assert kernels == [["first"], ["second"]]


def test_other_threads_wait_at_once(events):
    """`compat.waiting_once`: their code may run at once."""
    x = torch.rand(4)
    with compat.waiting_once(), ThreadPoolExecutor(1) as other:
        got = other.submit(lambda: generate(8.0, events)(x)[0]).result()
        assert events == ["waits", "saves", "generated"]
    torch.testing.assert_close(got, torch.sin(8 * x))


def test_compilers_are_started_once_and_not_waited_for(monkeypatch):
    """`compat.start_compilers`."""
    submitted: list[Any] = []

    class Pool:
        def submit(self, task: Any) -> Future:
            submitted.append(task)
            return Future()  # never ready

    monkeypatch.setattr(AsyncCompile, "process_pool", staticmethod(Pool))
    monkeypatch.setattr(AsyncCompile, "_ready_future", None)
    monkeypatch.setattr(async_compile, "get_compile_threads", lambda: 2)
    for _ in range(2):
        compat.start_compilers()
    assert len(submitted) == 1

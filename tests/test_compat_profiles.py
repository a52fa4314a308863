"""`fxpar.compat`: ranges that a profiler sees of generated code."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from fxpar import compat

aten = torch.ops.aten


def graph() -> fx.GraphModule:
    """Two products, and what is computed between them."""
    made = fx.Graph()
    x, w = made.placeholder("x"), made.placeholder("w")
    y = made.call_function(aten.relu.default, (made.call_function(aten.mm.default, (x, w)),))
    made.output((made.call_function(aten.mm.default, (y, w)),))
    return fx.GraphModule(nn.Module(), made)


def name(found: fx.Graph) -> None:
    for i, node in enumerate(n for n in found.nodes if n.op == "call_function"):
        compat.name_in_code(node, f"layers.{i}: {node.target._opname}", node.target is aten.mm.default)


def ranges(function: Callable[[], Tensor]) -> tuple[list[str], Tensor]:
    """The names of fxpar's that a profiler sees, in order, and what the function returned."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        compat.follow_profiler()
        made = function()
    seen = sorted((e for e in profile.events() if e.name.startswith(("layers.", "h."))), key=lambda e: e.time_range.start)
    return [e.name for e in seen], made


def test_generated_code_has_ranges_while_a_profiler_listens():
    torch.manual_seed(0)
    given = [torch.randn(8, 8), torch.randn(8, 8)]
    config = {"post_grad_custom_post_pass": compat.graph_pass(name), **compat.cache_settings(None, [])}
    with torch.no_grad():
        run = compat.compile_graph(graph(), given, config)

        def compute() -> Tensor:
            return run(*given)[0]

        want = compute()
        for _ in range(2):  # what was turned off is turned on again
            seen, made = ranges(compute)
            assert seen == ["layers.0: mm", "layers.1: relu", "layers.2: mm"]
            assert torch.equal(made, want)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                with compat.renamed({"layers.0": "h.6", "layers.2": "h.8"}):
                    compute()
            assert sorted(e.name for e in profile.events() if e.name.startswith(("layers.", "h."))) == [
                "h.6: mm", "h.8: mm", "layers.1: relu"]
            compat.follow_profiler()
            assert torch.equal(compute(), want)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                compute()  # without `follow_profiler` code is as it was
            assert not [e.name for e in profile.events() if e.name.startswith("layers.")]


def test_a_range_is_there_while_a_profiler_listens():
    """`compat.ranged`"""
    with compat.ranged("before"), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        with compat.ranged("inside"):
            torch.ones(1)
    assert {e.name for e in profile.events()} & {"before", "inside"} == {"inside"}


def test_code_for_cpus_has_comments_inside_alone():
    from torch._inductor.codegen.cpp import CppScheduling

    before = CppScheduling.codegen_comment
    with compat.comments_on_cpus():
        assert CppScheduling.codegen_comment is not before
    assert CppScheduling.codegen_comment is before

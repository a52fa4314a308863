"""`fxpar.compat`: what is kept of compiled graphs."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch._guards import TracingContext
from torch._higher_order_ops import invoke_subgraph

from fxpar import compat


def test_kernels_of_attention_have_an_order():
    assert sorted(compat.attention_priority()) == [*range(len(compat.attention_priority()))]


def test_calls_of_graphs_are_recognised():
    assert compat.is_subgraph_call(invoke_subgraph)
    assert not any(map(compat.is_subgraph_call, (torch.ops.aten.add.Tensor, torch.ops.higher_order.cond, torch.add)))


def test_sizes_are_fixed_where_none_depends_on_values():
    x = torch.ones(3, 1)
    with compat.sizes_to_compile([x], counts=False) as (same,):
        assert same is x and TracingContext.get().fake_mode.shape_env is not None
        assert tuple(TracingContext.get().fake_mode.from_tensor(x).shape) == (3, 1)
    with compat.sizes_to_compile([x], counts=True) as (fake,):
        assert isinstance(fake, compat.FakeTensor) and not isinstance(fake.nonzero().shape[0], int)


def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@pytest.mark.slow
def test_what_is_compiled_is_kept_under_its_key_alone():
    """`compat.cache_settings`, `compat.cache_counts`: of a graph that calls a function."""
    def compiled(key: str | None) -> dict[str, int]:
        graph = fx.Graph()
        graph.output((graph.call_function(doubled, (graph.placeholder("x"),)),))
        x, before = torch.ones(2, requires_grad=True), compat.cache_counts()
        config = compat.cache_settings(key, [f"{doubled.__module__}.doubled"]) if key != "none" else {}
        (y,) = compat.compile_graph(fx.GraphModule(torch.nn.Module(), graph), [x], config, backward_at_once=True)(x)
        y.sum().backward()
        assert x.grad.tolist() == y.tolist() == [2, 2]
        return {word: n for word, now in compat.cache_counts().items() if (n := now - before[word])}

    with torch._inductor.utils.fresh_cache():
        assert compiled("one") == {"miss": 1, "saved": 1, "graph miss": 2}
        assert compiled("one") == {"hit": 1, "graph hit": 2}
        assert compiled("other")["miss"] == 1
        for key in (None, "none"):
            assert compiled(key) == {"bypass": 1}

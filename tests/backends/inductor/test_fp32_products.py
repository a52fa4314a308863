"""Products of gradients written in the dtype in which they are summed."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from fxpar import compat
from fxpar.backends.inductor import casts, fp32_products

aten, c10d = torch.ops.aten, torch.ops._c10d_functional
WIDE = aten.mm.dtype


def gradient(device: str = "cuda", dtype: torch.dtype = torch.bfloat16, wide: torch.dtype = torch.float32,
             turn: list[int] | None = None, reused: str = "", computed: bool = False, sums: bool = False) -> fx.Graph:
    """x.T @ g, cast, rearranged by `turn`, reduced and returned; `reused`: "product" or "cast" is returned too."""
    mode, graph = compat.FakeTensorMode(), fx.Graph()

    def call(target, *args) -> fx.Node:
        node = graph.call_function(target, args)
        with mode:
            node.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))
        return node

    places = []
    for name in ("a", "b"):
        node = graph.placeholder(name)
        node.meta["val"] = compat.fake_like(mode, torch.empty(4, 4), torch.device(device), dtype)
        places.append(node)
    product = call(aten.mm.default, *places)
    cast = value = call(casts.CAST, product, wide)
    if turn:
        value = call(aten.permute.default, value, turn)
    kind = (c10d.all_reduce.default, value, "sum", "0") if sums else (c10d.reduce_scatter_tensor.default, value, "sum", 1, "0")
    wait = call(c10d.wait_tensor.default, call(*kind))
    out = call(aten.mul.Tensor, wait, places[0]) if computed else wait
    graph.output((out, *{"product": [product], "cast": [cast], "": []}[reused]))
    return graph


def in_fp32(graph: fx.Graph) -> bool:
    before = {n.target for n in graph.nodes}
    values = [(n.meta["val"].dtype, n.meta["val"].shape) for n in graph.output_node().all_input_nodes]
    fp32_products.accumulate_in_fp32(graph)
    assert [(n.meta["val"].dtype, n.meta["val"].shape) for n in graph.output_node().all_input_nodes] == values
    after = [n for n in graph.nodes if n.target is WIDE]
    for node in after:
        assert node.meta["val"].dtype is node.args[2] is torch.float32
        assert not any(n.target is aten.mm.default or n.target is casts.CAST for n in graph.nodes)
    assert after or {n.target for n in graph.nodes} == before
    return bool(after)


@pytest.mark.parametrize("change", [{}, {"dtype": torch.float16}, {"turn": [0, 1]}, {"sums": True}])
def test_a_gradient_that_is_summed_in_float32_is_written_in_it(two_ranks, change):
    assert in_fp32(gradient(**change))


@pytest.mark.parametrize("change", [
    {"device": "cpu"}, {"dtype": torch.float32, "wide": torch.float64}, {"wide": torch.float64}, {"turn": [1, 0]},
    {"reused": "product"}, {"reused": "cast"}, {"computed": True}])
def test_what_is_left_alone(two_ranks, change):
    assert not in_fp32(gradient(**change))


def test_a_graph_that_is_only_looked_at_is_as_on_a_gpu(two_ranks):
    graph = gradient(device="cpu")
    fp32_products.accumulate_in_fp32(graph, as_on_gpu=True)
    assert sum(n.target is WIDE for n in graph.nodes) == 1


@pytest.mark.gpu
def test_the_product_is_what_it_was_before_rounding():
    torch.manual_seed(0)
    a, b = (torch.randn(64, 512, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    have = WIDE(a, b.t(), torch.float32)
    torch.testing.assert_close(have, a.float() @ b.float().t(), rtol=1e-5, atol=1e-4)

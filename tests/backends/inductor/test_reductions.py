"""Reductions over leading dims, which Inductor may return without dims of size 1."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx

from fxpar import compat
from fxpar.backends.inductor.reductions import drop_kept_dims

aten = torch.ops.aten
X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))


def reduced(target, dims: list[int] | None, keep: bool) -> tuple[fx.GraphModule, fx.Node]:
    """A graph that returns a reduction, and what is computed from it."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(target, (x, dims, keep))
    x.meta["val"], node.meta["val"] = X, target(X, dims, keep)
    graph.output((node, graph.call_function(aten.exp.default, (node,))))
    return fx.GraphModule({}, graph), node


@pytest.mark.parametrize("target", [aten.sum.dim_IntList, aten.amax.default, aten.amin.default])
@pytest.mark.parametrize("dims", [[0], [1], [0, 1], [-3], [1, -3]])
def test_dims_that_are_kept_are_put_back_by_a_view(target, dims):
    module, node = reduced(target, dims, keep=True)
    want = module(X)
    drop_kept_dims(module.graph)
    module.recompile()
    assert all(torch.equal(a, b) and a.shape == b.shape for a, b in zip(module(X), want, strict=True))
    [flat] = [n for n in module.graph.nodes if n.target is target]
    assert flat.args[2] is False and flat.meta["val"].dim() == 3 - len(dims) and flat is not node


@pytest.mark.parametrize("dims, keep", [([2], True), ([0, 2], True), ([-1], True), ([0], False), (None, True), ([], True)])
def test_others_stay(dims, keep):
    module, node = reduced(aten.sum.dim_IntList, dims, keep)
    drop_kept_dims(module.graph)
    assert node in module.graph.nodes


@pytest.mark.gpu
def test_the_gradient_of_a_norms_weight_has_its_dims_where_it_leaves_a_graph():
    if not torch.cuda.is_available():
        pytest.skip("a GPU is needed")

    def backward(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return (x * g).sum(-1, keepdim=True) * x, (x * g).sum((0, 1), keepdim=True)

    passed = compat.graph_pass(drop_kept_dims, __file__, key="kept dims")
    x, g = (torch.randn(2, 8192, 2048, device="cuda") for _ in range(2))
    made = torch.compile(backward, options={"post_grad_custom_post_pass": passed})(x, g)
    assert made[1].shape == (1, 1, 2048)
    torch.testing.assert_close(made[1], backward(x, g)[1], rtol=1e-4, atol=1e-2)

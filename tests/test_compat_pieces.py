"""`fxpar.compat`: code of a graph that is cut into pieces, which PyTorch takes, and keeps, as that of a whole one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from fxpar import compat
from fxpar.backends.inductor import pieces, runs
from fxpar.compat import interpret_pieces, stages
from fxpar.compat.bundles import _path
from fxpar.compat.cut import one_piece

COUNT, WIDTH = 6, 8


def products(*inputs: Tensor) -> tuple[Tensor]:
    x, *weights = inputs
    for w in weights:
        x = (x @ w) @ w.t()
    return (x,)


def graph() -> fx.GraphModule:
    made = fx.Graph()
    x = made.placeholder("x")
    for w in [made.placeholder(f"w{i}") for i in range(COUNT)]:
        y = made.call_function(torch.ops.aten.mm.default, (x, w))
        x = made.call_function(torch.ops.aten.mm.default, (y, made.call_function(torch.ops.aten.t.default, (w,))))
    made.output((x,))
    return fx.GraphModule(nn.Module(), made)


def tensors() -> list[Tensor]:
    torch.manual_seed(0)
    return [(torch.randn(WIDTH, WIDTH) / 3).requires_grad_() for _ in range(COUNT + 1)]


@pytest.fixture
def cutting(monkeypatch) -> compat.Cutting:
    """`compat.Cutting`: products are compiled without a compiler of C++, so that blocks are of nothing else."""
    for module in (pieces, runs):
        monkeypatch.setattr(module, "SMALLEST", 1)

    def cut(module: fx.GraphModule, static: Sequence[int], donated: Sequence[int]) -> compat.Pieces | None:
        made = pieces.cut_into_pieces(module, static, donated)
        assert made is not None and len(made.graphs) < len(made.pieces)
        assert all(isinstance(p, compat.GraphPiece) for p in made.pieces)
        return made

    return cut


def test_pieces_compute_what_the_graph_does_and_are_found_again(cutting):
    """`compat.compile_graph` with `cutting`; what is kept of it under a key has the code of its pieces."""
    def results(cut: compat.Cutting | None, key: str | None) -> tuple[list[Tensor], dict[str, int]]:
        before, inputs = compat.cache_counts(), tensors()
        config = compat.cache_settings(key, [])
        run = compat.compile_graph(graph(), inputs, config, backward_at_once=True, cutting=cut)
        grads = []
        for _ in range(2):
            grads = list(torch.autograd.grad(run(*inputs)[0].square().sum(), inputs))
        return grads, {word: n for word, now in compat.cache_counts().items() if (n := now - before[word])}

    with torch._inductor.utils.fresh_cache():
        want, _ = results(None, None)
        made, counts = results(cutting, "key")
        assert counts["miss"] == counts["saved"] == 1
        found, counts = results(cutting, "key")
        assert counts["hit"] == 1 and "miss" not in counts
    for a, b, c in zip(want, made, found, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_what_runs_pieces_lets_go_of_its_inputs(cutting):
    """`compat.interpret_pieces`."""
    inputs = [x.detach() for x in tensors()]
    with compat.FakeTensorMode() as mode:
        module = compat.trace(products, [mode.from_tensor(x) for x in inputs])
    run, given = compat.interpret_pieces(cutting(module, (), ()), fx.Interpreter), list(inputs)
    (have,) = run(given)
    assert given == [] and torch.equal(have, products(*inputs)[0])


@pytest.mark.slow
def test_pieces_in_steps_compute_what_the_graph_does(cutting):
    """`compat.compile_steps` and `compat.interpret_steps` with `cutting`."""
    inputs = tensors()
    want = torch.autograd.grad(products(*inputs)[0].sum(), inputs)
    for interpreted in (False, True):
        parts: list = []

        def cut(module, like, saved, donated, make, parts=parts):
            parts.append(make(module, like, donated, len(inputs))[0])

        if interpreted:
            made = compat.interpret_steps(graph(), inputs, {}, fx.Interpreter, cut, cutting=cutting)
        else:
            made = compat.compile_steps(graph(), inputs, {}, cut, cutting=cutting)
        with compat.as_traced():
            out, *saved = made.run([x.detach() for x in inputs])
            have = parts[0]([*saved, torch.ones_like(out)])
        for a, b in zip(want, have, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("cut", [False, True])
def test_a_graph_behind_all_passes_is_compiled_or_run(cut, cutting):
    """`stages.graphs_before` with `then`, within `compat.faked`; `compat.code_of` and `compat.interpret_final`, and
    `compat.bundle_key`, `keep_bundle` and `kept_bundle` of their code."""
    codes, given = [], tensors()

    def generate(graphs: list[stages.HandedOver]) -> None:
        assert (graphs[0].seeds, graphs[0].outputs, graphs[0].donated) == ([0], 1, [])
        assert graphs[1].options["is_backward"] and not graphs[0].options["is_inference"]
        for handed in graphs:
            module = stages.apply_graph_passes(handed.module, {}, handed.options["is_inference"])
            saved = len(handed.inputs) - 1 if handed.options.get("is_backward") else 0
            count = len(module.graph.output_node().args[0])
            code, strides = compat.code_of(cutting if cut else None)(module, handed.options, handed.donated, range(saved), count)
            run, none = compat.interpret_final(fx.Interpreter, cutting if cut else None, module, handed.options)
            assert len(strides) == len(none) == count and {*none} == {None}
            codes.append((code, run))

    with torch._inductor.utils.fresh_cache():
        with compat.faked(given) as fakes:
            stages.graphs_before(graph(), fakes, {}, then=generate)
        (expected,) = products(*given)
        wanted = torch.autograd.grad(expected.sum(), given)
        key = compat.bundle_key("a graph")
        assert key != compat.bundle_key("another") and compat.kept_bundle(key, given) is None
        before = compat.cache_counts()["saved"]
        compat.keep_bundle(key, [code for code, _ in codes], {"more": 1})
        assert compat.cache_counts()["saved"] == before + 1
        found, more = compat.kept_bundle(key, given)
        assert more == {"more": 1}
        Path(_path(key)).write_bytes(b"damaged")
        assert compat.kept_bundle(key, given) is None
        for forward, backward in (found, *zip(*codes, strict=True)):
            with compat.as_traced():
                made = list(forward([x.detach() for x in given]))
                grads = backward([*made[1:], torch.ones_like(made[0])])
            torch.testing.assert_close(made[0], expected.detach())
            for mine, theirs in zip(grads, wanted, strict=True):
                torch.testing.assert_close(mine, theirs)
    with torch._inductor.config.patch(fx_graph_cache=False):
        assert compat.bundle_key("a graph") is None


def test_a_graph_that_is_not_cut_is_one_piece():
    """`fxpar.compat.cut.one_piece`: of a graph that returns an input, a value twice, and nothing."""
    made = fx.Graph()
    x, y = made.placeholder("x"), made.placeholder("y")
    total = made.call_function(torch.ops.aten.add.Tensor, (x, y))
    for node in (x, y, total):
        node.meta["val"] = torch.zeros(2)
    made.output((total, x, None, total))
    pieces = one_piece(fx.GraphModule(nn.Module(), made), donated=[1], exact=1)
    assert (pieces.pieces[0].before, pieces.pieces[0].exact, pieces.results) == ([1], [0], [2, 0, None, 2])
    a, b = torch.ones(2), torch.ones(2)
    first, second, none, third = interpret_pieces(pieces, fx.Interpreter)([a, b])
    assert first.tolist() == [2, 2] and second is a and none is None and third is first


def test_no_mode_sees_what_is_made_beside_a_trace():
    """`compat.no_modes`"""
    with compat.FakeTensorMode():
        assert isinstance(torch.ones(1), compat.FakeTensor)
        with compat.no_modes():
            assert not isinstance(torch.ones(1), compat.FakeTensor)


def test_sizes_that_are_known_only_when_a_graph_runs():
    """`compat.is_counted`: of values of a trace."""
    with compat.sizes_to_compile([torch.ones(3)], counts=True) as (x,):
        made = compat.trace(lambda x: (x.nonzero(), x.nonzero().size(0), x * 2, x.size(0)), [x])
        values = [n.meta["val"] for n in made.graph.nodes if n.op == "call_function"]
        told = {type(v).__name__: compat.is_counted(v) for v in [*values, 3, None] if not isinstance(v, Tensor)}
        assert told == {"SymInt": True, "int": False, "NoneType": False}
        assert sorted(compat.is_counted(v) for v in values if isinstance(v, Tensor)) == [False, True, True]

"""`fxpar.compat`: code of a graph that is cut into pieces, which PyTorch takes, and keeps, as that of a whole one."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, fx, nn

from fxpar import compat
from fxpar.backends.inductor import pieces

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
    monkeypatch.setattr(pieces, "SMALLEST", 1)

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

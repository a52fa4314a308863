"""pieces: what Inductor makes of a graph that is cut into pieces, of which equal ones are compiled once.

Here the graph's whole code is put together from that of its pieces, in a form that PyTorch takes, and keeps on disk, as it does
the code of one graph.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch._functorch import config as aot
from torch._guards import TracingContext
from torch._inductor import compile_fx as inductor
from torch._inductor import config
from torch._inductor.codecache import FxGraphCache
from torch._inductor.output_code import CompiledFxGraphConstants, OutputCode

from fxpar.compat.cut import Cutting, GraphPiece, Pieces, Step, is_counted, one_piece, run_pieces, schedule
from fxpar.compat.profiles import profiling, renamed
from fxpar.compat.quick import Entrance, may_be_quick, quick, run_quickly
from fxpar.compat.stages import values_stay
from fxpar.compat.steps import after_graph_passes
from fxpar.compat.waits import waiting_once

log = logging.getLogger("fxpar")


class CodeOfPieces(OutputCode):
    """The code of a graph, of which each class of equal pieces is there once."""

    def __init__(self, codes: list[Any], pieces: Pieces, of: Sequence[int]):
        super().__init__()
        self._boxed_call = True
        self.codes = codes
        self.steps, self.empty, self.results = schedule(pieces, of)
        self.names = [piece.names for piece in pieces.pieces]
        self._counted = {i for i, x in enumerate(pieces.inputs) if is_counted(x)}
        self._entrance: Entrance | None = None
        self._quick: dict[bool, Callable[[list[Any]], list[Any]]] = {}

    def __call__(self, inputs: Any) -> Any:
        named = profiling()
        if self._entrance is None or not may_be_quick():
            entrance = Entrance(inputs, self._counted)
            made = (self._run_named if named else self._run_as_it_is)(self.codes, inputs)
            self._entrance = self._entrance or entrance
            return made
        self._entrance(inputs)
        if named not in self._quick:
            run = self._run_named if named else self._run_as_it_is
            self._quick[named] = functools.partial(run, [quick(code, named) for code in self.codes])
        return run_quickly(self._quick[named], inputs)

    def _run_as_it_is(self, codes: Sequence[Callable[[list[Any]], Any]], inputs: Any) -> Any:
        return run_pieces(codes, self.steps, self.empty, self.results, inputs)

    def _run_named(self, codes: Sequence[Callable[[list[Any]], Any]], inputs: Any) -> Any:
        """Run it with ranges that have the names of each piece's own blocks."""
        named = zip(self.names, self.steps, strict=True)
        each = [functools.partial(_named, names, codes[step[0]]) for names, step in named]
        steps: list[Step] = [(i, *step[1:]) for i, step in enumerate(self.steps)]
        return run_pieces(each, steps, self.empty, self.results, inputs)

    def post_compile(self, example_inputs: Any, constants: CompiledFxGraphConstants, graph_kwargs: Any) -> None:
        """Make ready what was kept on disk."""
        for i, code in enumerate(self.codes):
            if code.current_callable is None:
                loaded, _ = FxGraphCache.cache_hit_post_compile(code, {}, constants)
                if loaded is None:
                    raise RuntimeError("a piece of compiled code is not on disk any more")
                with TracingContext.report_output_strides():
                    loaded.post_compile(example_inputs, constants, graph_kwargs)
                self.codes[i] = loaded

    def prepare_for_serialization(self) -> None:
        self._entrance, self._quick = None, {}
        self.codes = [copy.copy(code) for code in self.codes]
        for code in self.codes:
            code.prepare_for_serialization()

    def set_triton_bundle(self, triton_bundle: Any) -> None:
        """Each piece has its own."""


def _named(names: dict[str, str], code: Callable[[list[Any]], Any], given: list[Any]) -> Any:
    with renamed(names):
        return code(given)


def compile_cut(cutting: Cutting, module: fx.GraphModule, example: Sequence[Any], **options: Any) -> Any:
    """As `compile_fx_inner`, but of the pieces of a graph that can be cut each class of equal ones is compiled once."""
    pieces = pieces_of(cutting, module, example, options)
    if pieces is not None:
        log.info("%s: %d pieces, of which %d are compiled", "the backward" if options.get("is_backward") else "the forward",
                 len(pieces.pieces), len(pieces.graphs))
        return compile_pieces(pieces, options)
    if not any(n.op.startswith("call") for n in module.graph.nodes):
        return inductor.compile_fx_inner(module, example, **options)
    with aot.patch(bundled_autograd_cache=False):
        return inductor.compile_fx_inner(module, example, **options)


def pieces_of(cutting: Cutting, module: fx.GraphModule, example: Sequence[Any], options: dict[str, Any]) -> Pieces | None:
    """The pieces of a graph as it is behind all graph passes, which a copy of it goes through. options: of `compile_fx_inner`."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    copied = fx.GraphModule(module, graph)
    with values_stay():  # each piece has its values computed again
        after_graph_passes(copied, example, options.get("is_inference", False))
    metadata: Any = TracingContext.get().fw_metadata
    donated = metadata.bw_donated_idxs if options.get("is_backward") else None
    return cutting(copied, options.get("static_input_idxs", ()), donated or ())


def compile_pieces(pieces: Pieces, options: dict[str, Any]) -> CodeOfPieces:
    """Generate code for each class of equal pieces. options: those of `compile_fx_inner` for the whole graph.

    The graph has been through all passes. How Inductor lays out what leaves the graph is reported as it does for a whole one.
    """
    context: Any = TracingContext.get()
    values: list[Any] = [*pieces.inputs, *[None] * (pieces.slots - len(pieces.inputs))]
    made: dict[Any, tuple[int, list[Tensor]]] = {}
    codes: list[Any] = []
    of: list[int] = []
    with waiting_once():
        for piece in pieces.pieces:
            given = [values[slot] for slot in piece.takes]
            known = piece.kind, tuple((x.shape, x.stride(), x.dtype) for x in given if not is_counted(x))
            if known not in made:
                code, like = _compile(pieces.graphs[piece.kind], given, piece, options, context)
                made[known] = len(codes), like
                codes.append(code)
            number, like = made[known]
            of.append(number)
            for i, slot in enumerate(piece.gives):
                values[slot] = piece.counted.get(i, like[i])
    if context.output_strides is not None:
        results = [None if slot is None else values[slot] for slot in pieces.results]
        context.output_strides += [tuple(x.stride()) if isinstance(x, Tensor) else None for x in results]
    return CodeOfPieces(codes, pieces, of)


def compile_final(cutting: Cutting | None, module: fx.GraphModule, options: dict[str, Any], donated: Sequence[int] = (),
                  static: Sequence[int] = (), exact: int = 0, like: Sequence[Any] | None = None
                  ) -> tuple[CodeOfPieces, list[Any]]:
    """The code of a graph that has been through all passes, and the strides of its outputs (None where it gives none).

    cutting: what may cut it into pieces, of which equal ones are compiled once. options: of `compile_fx_inner`. donated, static:
    see `Cutting`. exact: how many of its first outputs have to lie in memory as the graph says. like: what it is given, where
    that lies otherwise than the graph says.
    """
    inductor.view_to_reshape(module)
    if like is not None:
        with torch.no_grad():
            inductor.fake_tensor_prop(module, like)
    module.graph.output_node().meta["user_visible_output_idxs"] = list(range(exact))
    pieces = cutting(module, static, donated) if cutting is not None else None
    if pieces is None:
        pieces = one_piece(module, static, donated, exact)
    else:
        log.info("%s: %d pieces, of which %d are compiled", "the backward" if options.get("is_backward") else "the forward",
                 len(pieces.pieces), len(pieces.graphs))
    with TracingContext.report_output_strides() as strides:
        return compile_pieces(pieces, options), list(strides or ())


def _compile(module: fx.GraphModule, given: list[Tensor], piece: GraphPiece, options: dict[str, Any],
             context: Any) -> tuple[Any, list[Tensor]]:
    """The code of a piece, and what its outputs are like."""
    from fxpar.compat import graph_pass

    module.graph.output_node().meta["user_visible_output_idxs"] = piece.exact
    # What is overwritten, and seen, is no part of the key by which Inductor finds what it compiled before: a pass is.
    mark = graph_pass(lambda graph: None, key=f"piece, may overwrite {piece.donated}, visible {piece.exact}")
    settings = {"use_post_grad_passes": False, "post_grad_custom_pre_pass": mark}
    inductor.view_to_reshape(module)
    with torch.no_grad():
        mode = inductor.fake_tensor_prop(module, given)
    results: Any = module.graph.output_node().args[0]
    values = [n.meta["val"] for n in results]
    with (aot.patch(bundled_autograd_cache=False), config.patch(settings),
          mock.patch.object(inductor, "fake_tensor_prop", lambda *_: mode),  # not a second time
          mock.patch.object(context.fw_metadata, "bw_donated_idxs", piece.donated),
          TracingContext.report_output_strides() as strides):
        code = inductor.compile_fx_inner(module, given, **options | {"static_input_idxs": piece.fixed})
    return code, [x if stride is None or x.stride() == tuple(stride) else x.new_empty_strided(x.shape, stride)
                  for x, stride in zip(values, strides or [None] * len(values), strict=True)]

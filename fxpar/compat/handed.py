"""handed: the graphs for which Inductor generates code, handed over or run operator by operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext

from fxpar.compat.cut import Cutting, interpret_pieces
from fxpar.compat.steps import after_graph_passes, output_code, sizes_of_values


def lowered_graphs(gm: fx.GraphModule, inputs: list[torch.Tensor], config: dict[str, Any]) -> list[fx.GraphModule]:
    """The graphs that `compile_graph` would generate code for, after all graph passes: the forward and, if there is one, the
    backward. Nothing is compiled or run; `inputs` may be fake."""
    found: list[fx.GraphModule] = []
    _through_graph_passes(gm, inputs, config, lambda module, *_: found.append(module))
    return found


def interpret_graph(gm: fx.GraphModule, inputs: list[torch.Tensor], config: dict[str, Any],
                    interpreter: type[fx.Interpreter], counts: bool = False, cutting: Cutting | None = None) -> Callable:
    """As `compile_graph`, but `interpreter` runs the graphs of `lowered_graphs`, or their pieces, where code would have been
    generated."""
    def run(module: fx.GraphModule, static: Sequence[int] = (), donated: Sequence[int] = ()) -> Any:
        pieces = None if cutting is None else cutting(module, static, donated)
        if pieces is not None:
            return interpret_pieces(pieces, interpreter)
        return lambda given: interpreter(module).boxed_run(given)

    with sizes_of_values(inputs, counts) as inputs:
        return _through_graph_passes(gm, inputs, config, run)


def _through_graph_passes(gm: fx.GraphModule, inputs: list[torch.Tensor], config: dict[str, Any],
                          run: Callable[..., Any]) -> Callable:
    """`compile_fx` with ``run(module, static, donated)``, a callable over a list of inputs, in the place of generated code; for
    static and donated see `Cutting`."""
    from torch._functorch import config as aot
    from torch._inductor.compile_fx import compile_fx

    def keep(module: fx.GraphModule, example: Any, is_inference: bool = False, **options: Any) -> Any:
        after_graph_passes(module, example, is_inference)
        metadata: Any = TracingContext.get().fw_metadata
        donated = metadata.bw_donated_idxs if options.get("is_backward") else None
        return output_code(run(module, options.get("static_input_idxs", ()), donated or ()))

    with aot.patch(enable_autograd_cache=False, force_non_lazy_backward_lowering=True):
        compiled: Any = compile_fx(gm, inputs, inner_compile=keep, config_patches=config)
    return compiled

"""buffers: what a forward computes with of a buffer that it changes is a copy, which a backward finds as it was."""

from __future__ import annotations

import functools
import operator

from fxpar.ops.before import before
from fxpar.passes.rewrite import Rewriter
from fxpar.program import Program, made_from


def keep_buffers(program: Program) -> Program:
    """Have a program read, in place of a buffer that it writes, the copy of it that `before` makes.

    Takes: a simplified program. Afterwards: so it is of each buffer that is written and that an output of the model depends on
    (spectral norm's vectors, a codebook; running statistics, of which only their new values are made, are read as they are). A
    backward pass, or a later microbatch's forward, that reads the copy finds what was there before the forward wrote.
    """
    outputs = list(zip(program.outputs(), program.tensor_sinks(), strict=True))
    written = {sink.name for _, sink in outputs if sink.kind == "buffer"}
    needed = made_from(*(node for node, sink in outputs if sink.kind != "buffer")) if written else set()
    for node, source in zip(program.placeholders(), program.sources, strict=True):
        if source.kind == "buffer" and source.name in written and node in needed:
            first = next(n for n in program.graph.nodes if n.op != "placeholder")
            copy = Rewriter(program.graph, first).call(before, node)
            node.replace_all_uses_with(copy, delete_user_cb=functools.partial(operator.is_not, copy))
    return program

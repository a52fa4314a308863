"""outputs: with ``Plan(outputs="loss")`` only the loss is computed to its end."""

from __future__ import annotations

from fxpar.errors import PlanError
from fxpar.passes.rewrite import remove_unread
from fxpar.program import Program, Sink


def keep_loss(program: Program) -> Program:
    """Drop every output but the loss (the first floating scalar), if the plan asks for that.

    Afterwards: the dropped outputs are None in the model's output, and what only they needed (logits kept for the
    caller) is gone from the program. What updates buffers and attributes stays.
    Raises: `PlanError` if the model returns no scalar.
    """
    if program.plan.outputs != "loss":
        return program
    kept, sinks, found = [], [], False
    nodes = iter(program.outputs())
    for sink in program.sinks:
        if sink.kind == "literal":
            sinks.append(sink)
            continue
        node = next(nodes)
        value = node.meta["val"]
        is_loss = sink.kind == "output" and not found and value.dim() == 0 and value.is_floating_point()
        if is_loss or sink.kind in ("buffer", "attribute"):
            found = found or is_loss
            sinks.append(sink)
            kept.append(node)
        else:
            sinks.append(Sink("literal", sink.name))
    if not found:
        raise PlanError("outputs", "loss", "needs a model that returns a scalar loss (pass labels?)", "all")
    program.sinks = sinks
    program.graph.output_node().args = (tuple(kept),)
    remove_unread(program.graph)
    return program

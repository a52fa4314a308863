"""Captured programs as texts that can be compared."""

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxpar import Plan
from fxpar.model.inputs import example_call
from fxpar.passes.capture import capture as capturing
from fxpar.program import module_path
from fxpar.sharding import mesh as meshes


def texts(program):
    """The program's nodes: targets, arguments by the number of their nodes, values, modules and lines; inputs by their names."""
    known, out = {}, []
    for node, source in program.source_of().items():
        known[node] = source.name if source.kind != "constant" else repr(source.value)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            continue
        args = fx.node.map_aggregate((node.args, node.kwargs), lambda a: known[a] if isinstance(a, fx.Node) else a)
        values = [(tuple(t.shape), t.stride(), t.dtype, t.requires_grad) for t in pytree.tree_leaves(node.meta.get("val"))
                  if isinstance(t, torch.Tensor)]
        stack = [tuple(entry) for entry in (node.meta.get("nn_module_stack") or {}).values()]
        line = "" if node.target is torch.ops.aten.detach.default else (node.meta.get("stack_trace") or "").split("File ")[-1]
        out.append(f"{node.op} {node.target} {args} {values} {module_path(node)} {stack} {line}")
        known[node] = f"%{len(out)}"
    return out


def facts(program, model):
    named = [(s.kind, s.name, s.requires_grad, s.storage_dtype) for s in program.sources if s.kind != "constant"]
    slots = {s.text for s in program.reads.slots(model) if "constant" not in s.text}
    writes = [(w.name, w.key, str(w.value), w.read) for w in program.writes]
    return named, [(s.kind, s.name, s.constant) for s in program.sinks], program.notes, program.tied, slots, writes


def captured(model, inputs):
    plan = Plan.of("dp=1")
    return capturing.capture(model, plan, meshes.from_plan(plan), *example_call(model, inputs), torch.device("cpu"))

"""What the canonicalising passes share."""

import torch
from torch import fx

from fxpar.passes.rewrite import remove_unread


def test_what_nobody_reads_goes_with_what_it_alone_reads_and_what_has_an_effect_stays():
    graph = fx.Graph()
    x, unread = graph.placeholder("x"), graph.placeholder("unread")
    read = graph.call_function(torch.ops.aten.relu.default, (x,))
    dead = graph.call_function(torch.ops.aten.neg.default, (read,))
    graph.call_function(torch.ops.aten.abs.default, (dead,))
    written = graph.call_function(torch.ops.aten.add_.Tensor, (x, 1))
    graph.output((read,))
    remove_unread(graph)
    assert [n.name for n in graph.nodes] == ["x", "unread", read.name, written.name, "output"] and not unread.users
    remove_unread(graph, lambda node: node.op != "call_function")
    assert [n.name for n in graph.nodes] == ["x", "unread", read.name, "output"]

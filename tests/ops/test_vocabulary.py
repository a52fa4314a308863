"""What passes and backends mean by the words they share."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx

from fxpar.ops.vocabulary import bytes_of, is_view

aten = torch.ops.aten


@pytest.mark.parametrize("target, view", [
    (aten.permute.default, True), (aten.view.default, True), (aten.expand.default, True),
    (aten._unsafe_view.default, False), (aten.clone.default, False), (aten.view_copy.default, False),
    (operator.getitem, False), (torch.ops._c10d_functional.wait_tensor.default, False),
])  # fmt: skip
def test_views_are_what_say_so(target, view):
    graph = fx.Graph()
    assert is_view(graph.call_function(target, (graph.placeholder("x"),))) == view


@pytest.mark.parametrize("make", [torch.empty, lambda *s, **o: torch.empty(*s, **o).expand(3, *s)])
def test_bytes_are_those_of_the_elements_that_are_seen(make):
    node = fx.Graph().placeholder("x")
    node.meta["val"] = make(2, 5, dtype=torch.float16, device="meta")
    assert bytes_of(node) == node.meta["val"].numel() * 2

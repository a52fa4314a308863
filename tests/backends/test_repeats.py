"""Runs of equal blocks: proved in graphs, shortened and lengthened."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from fxpar.backends import periods, repeats


def tower(layers: int) -> fx.Graph:
    """Layers of a product and a relu, their weights cast first."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    weights = [graph.placeholder(f"w{i}") for i in range(layers)]
    casts = [graph.call_method("double", (w,)) for w in weights]
    for w in casts:
        x = graph.call_function(torch.relu, (graph.call_function(torch.matmul, (x, w)),))
    graph.output((graph.call_method("sum", (x,)),))
    return graph


def text(graph: fx.Graph) -> list[tuple]:
    number = {n: i for i, n in enumerate(graph.nodes)}
    return [(n.op, n.op if n.op == "placeholder" else n.target, [number[m] for m in n.all_input_nodes]) for n in graph.nodes]


def test_what_is_shortened_and_lengthened_is_as_if_written_so():
    graph = tower(9)
    run = repeats.find(graph, lambda n: None, 5)
    assert run is not None and (run.count, run.region) == (8, 2)
    periods.shorten(run, 4)
    assert text(graph) == text(tower(5))
    again = repeats.find(graph, lambda n: None, 3)
    assert again is not None
    periods.lengthen(again, 6)
    graph.lint()
    assert text(graph) == text(tower(11))


def test_blocks_that_differ_are_no_run():
    graph = tower(9)
    graph.find_nodes(op="call_function", target=torch.relu)[4].target = torch.sigmoid
    run = repeats.find(graph, lambda n: None, 6)
    assert run is not None and run.region == 1  # the casts alone
    graph = tower(9)
    other = graph.find_nodes(op="placeholder")[5]
    assert repeats.find(graph, lambda n: n is other, 6) is None


def test_a_block_that_is_read_elsewhere_is_not_taken_out():
    graph = tower(9)
    output = graph.output_node()
    output.args = ((*output.args[0], graph.find_nodes(op="call_function", target=torch.relu)[4]),)
    run = repeats.find(graph, lambda n: None, 5)
    assert run is not None
    with pytest.raises(repeats.NotEqual):
        periods.shorten(run, 4)


def test_what_is_written_of_a_graph_does_not_depend_on_the_order_of_placeholders():
    graph = tower(3)
    first, second = graph.find_nodes(op="placeholder")[1:3]
    second.append(first)
    made, numbers = repeats.written(graph, lambda n: None)
    assert made == repeats.written(tower(3), lambda n: None)[0] and numbers[first] < numbers[second]
    assert made != repeats.written(tower(4), lambda n: None)[0]
    swapped = tower(3)
    a, b = swapped.find_nodes(op="call_method", target="double")[:2]
    a.replace_all_uses_with(b)
    assert made != repeats.written(swapped, lambda n: None)[0]


@pytest.mark.parametrize("numbers, even", [(range(9), True), ([*range(8), 18], False)])
def test_blocks_are_numbered_evenly_or_not_put_back(numbers, even):
    graph = tower(9)
    for i, node in zip(numbers, graph.find_nodes(op="call_function", target=torch.relu), strict=True):
        node.meta["nn_module_stack"] = {"key": (f"layers.{i}", torch.nn.ReLU)}
    run = repeats.find(graph, lambda n: None, 5)
    assert run is not None
    if even:
        repeats.check_names(run)
    else:
        with pytest.raises(repeats.NotEqual):
            repeats.check_names(run)

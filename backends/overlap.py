"""overlap: order the operators of a compiled graph so that communication runs beside computation.

A pass over the graphs that Inductor is about to lower (forward and backward); Inductor keeps the order it is given. On a
GPU a collective runs on a stream of its own, from the operator that starts it to the `wait_tensor` before its first
use. The order follows from the graph alone, so every rank issues the same collectives in the same order.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import fx

c10d = torch.ops._c10d_functional
STARTS = (c10d.all_reduce.default, c10d.all_gather_into_tensor.default, c10d.reduce_scatter_tensor.default,
          c10d.all_to_all_single.default)  # fmt: skip
WAIT = c10d.wait_tensor.default
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)
FLOPS_PER_BYTE = 2000
"""Operations a GPU computes while a link moves one byte (600 TFLOP/s beside 300 GB/s)."""
PATIENCE = 250
"""A weight gradient is held back for at most this many operators (what it needs stays in memory meanwhile)."""


def overlap_communication(graph: fx.Graph) -> None:
    """Reorder `graph` in place.

    Takes: a functional graph with ``_c10d_functional`` operators and fake values in ``meta["val"]``.
    Afterwards: the same operators in another valid order. Waits come right before their first use. Products that only
    outputs follow from (weight gradients) are held back until a collective that others wait for has started, and
    then run beside it, as many as the transfer takes time. What follows such a product (a cast: a short kernel) comes
    right after the next start, before the next product, so that the collective is on the GPU before a kernel that
    takes all of it.
    """
    _Scheduler(graph).run()


class _Scheduler:
    def __init__(self, graph: fx.Graph):
        self.graph = graph
        self.nodes = [n for n in graph.nodes if n.op != "output"]
        self.late = _followed_by_outputs_only(self.nodes)
        self.done: set[fx.Node] = set()
        self.placed: list[fx.Node] = []
        self.held: deque[tuple[int, fx.Node]] = deque()
        self.trailing: list[fx.Node] = []

    def run(self) -> None:
        for at, node in enumerate(self.nodes):
            if node.target is WAIT or node in self.done:
                continue
            if node in self.late:
                if node.target in PRODUCTS:
                    self.held.append((at, node))
                elif not self._behind_held(node):
                    self._place(node)
                continue
            self._place(node)
            if node.target in STARTS:
                self._cover(_bytes(node) * FLOPS_PER_BYTE)
            while self.held and at - self.held[0][0] > PATIENCE:
                self._release()
        while self.held:
            self._release()
        self._follow()
        for node in self.nodes:
            self._place(node)
        output = self.graph.output_node()
        for node in self.placed:
            if node.op != "placeholder":
                output.prepend(node)
        self.graph.lint()

    def _behind_held(self, node: fx.Node) -> bool:
        return any(n not in self.done and (n in self.late or n.target is WAIT) for n in node.all_input_nodes)

    def _cover(self, flops: float) -> None:
        """Run held products beside a transfer that takes as long as `flops`."""
        self._follow()
        while self.held and flops > 0:
            flops -= _flops(self.held[0][1])
            self._release()

    def _release(self) -> None:
        """Place the oldest held product, after what followed the one before."""
        self._follow()
        _, product = self.held.popleft()
        self._place(product)
        self.trailing.append(product)

    def _follow(self) -> None:
        """Place what follows the last product and can start (its own reduction, not the wait for it)."""
        stack = [u for product in self.trailing for u in product.users if u in self.late]
        self.trailing.clear()
        while stack:
            node = stack.pop()
            if node.target is not WAIT and not self._behind_held(node):
                self._place(node)
                stack.extend(u for u in node.users if u in self.late)

    def _place(self, node: fx.Node) -> None:
        """Place a node after everything that it needs."""
        stack = [node]
        while stack:
            top = stack[-1]
            missing = [m for m in top.all_input_nodes if m not in self.done]
            if missing and top not in self.done:
                stack.extend(missing)
                continue
            stack.pop()
            if top not in self.done:
                self.done.add(top)
                self.placed.append(top)


def _followed_by_outputs_only(nodes: list[fx.Node]) -> set[fx.Node]:
    """Operators of which every path leads straight to an output, through operators of the same kind."""
    late: set[fx.Node] = set()
    for node in reversed(nodes):
        if node.op == "call_function" and node.users and all(
                u.op == "output" or u in late and u.target not in PRODUCTS for u in node.users):
            late.add(node)
    return late


def _bytes(node: fx.Node) -> float:
    values = (node.meta.get("val"), node.args[0].meta.get("val"))  # type: ignore[union-attr]
    return max((v.numel() * v.element_size() for v in values if isinstance(v, torch.Tensor)), default=0)


def _flops(node: fx.Node) -> float:
    left, out = node.args[-2].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    return 2.0 * out.numel() * left.shape[-1]

"""block: the graph of one block of the model: what it computes and communicates, in boxes; the layouts of values, on edges.

Products, attention and collectives are boxes of their own; what a module does between them is one box. Parameters, and what
depends on nothing but inputs (positions, masks), are left out.
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from dataclasses import dataclass, field

from torch import fx

from fxpar.cost.operators import measure
from fxpar.ops.collectives import typed
from fxpar.ops.ring.operator import ring_attention
from fxpar.ops.vocabulary import ATTENTION, is_view
from fxpar.program import Program, block_path, module_path
from fxpar.report.html.lanes import COLOURS, source_line
from fxpar.report.html.svg import drawing, tag, words
from fxpar.report.traffic import strategy_of
from fxpar.report.words import DimWords, dims_of_layout, short
from fxpar.sharding.facts import if_local
from fxpar.sharding.mesh import Axes

WIDE, HIGH, ACROSS, DOWN, MARGIN = 190.0, 40.0, 46.0, 36.0, 8.0
MOVES = ("to", "_to_copy", "reshape", "contiguous", "clone", "movedim", "transpose", "flatten", "squeeze", "unsqueeze")
LONGEST = 26
"""Letters of a box's title."""
MOST = 140
"""Boxes that are drawn; a larger block is not."""


@dataclass(eq=False)
class Box:
    """title, line: what it says; text: what the pointer shows. nodes: what it stands for. level, x: where it is."""

    title: str
    line: str
    text: str
    colour: str
    nodes: list[fx.Node]
    level: int = 0
    x: float = 0.0
    after: dict[Box, str] = field(default_factory=dict)
    """Boxes that take a value of this one -> the value's layout."""


def drawn(program: Program) -> tuple[str, str]:
    """(the block, its graph as markup) of the block in the middle; ("", ...) of a program without blocks."""
    blocks = list(dict.fromkeys(b for n in program.graph.nodes if n.op == "call_function" and (b := block_path(n))))
    if not blocks:
        return "", tag("p", "The model has no list of equal modules, so no block of it is drawn.")
    name = blocks[len(blocks) // 2]
    boxes = boxes_of(program, name)
    if not 0 < len(boxes) <= MOST:
        return name, tag("p", words(f"{name} has {len(boxes)} parts, too many to be drawn."))
    return name, tag("div", _drawing(boxes), class_="wide graph")


def boxes_of(program: Program, block: str) -> list[Box]:
    """The parts of a block, in the order in which they run."""
    activations, costs = _activations(program), measure(program).costs
    nodes = [n for n in program.graph.nodes if n in activations and n.op == "call_function" and block_path(n) == block]
    alone = {
        n
        for n in nodes
        if typed(n) is not None or n.target is ring_attention or n.target in ATTENTION or (n in costs and costs[n].forward)
    }
    group = _grouped(nodes, alone)
    members: dict[int, list[fx.Node]] = {}
    for node in nodes:
        members.setdefault(group[node], []).append(node)
    box = {key: _box(program, block, held, held[0] in alone) for key, held in members.items()}
    for node in nodes:
        for user in node.users:
            if user in group and group[user] != group[node]:
                after, other = box[group[node]].after, box[group[user]]
                after[other] = layout_words(node) or after.get(other, "")
    made = list(box.values())
    _tell_apart(made)
    entering = {n: [u for u in n.users if u in group] for n in activations if n not in group}
    for node, users in entering.items():
        if users:
            line = source_line(node)
            start = Box("from before", line.partition("  ")[0], line, "plain", [node])
            start.after = {box[group[u]]: layout_words(node) for u in users}
            made.insert(0, start)
    leaving = [n for n in nodes if any(u not in group for u in n.users)]
    if leaving:
        end = Box("to what follows", "", "", "plain", [])
        for node in leaving:
            box[group[node]].after[end] = layout_words(node)
        made.append(end)
    return made


def _activations(program: Program) -> set[fx.Node]:
    """What depends on parameters, and on inputs or what is received."""
    of_parameters: set[fx.Node] = set()
    of_data: set[fx.Node] = set()
    for node, source in program.source_of().items():
        if source.kind in ("param", "received"):
            of_parameters.add(node)
        if source.kind != "param":
            of_data.add(node)
    for node in program.graph.nodes:
        for found in (of_parameters, of_data):
            if any(n in found for n in node.all_input_nodes):
                found.add(node)
    return of_parameters & of_data


def _grouped(nodes: list[fx.Node], alone: set[fx.Node]) -> dict[fx.Node, int]:
    """Node -> its group. What is not alone is with what it takes from, of the same module, with as many of those alone before."""
    depth: dict[fx.Node, int] = {}
    group: dict[fx.Node, int] = {}
    closed = set(alone)  # and what merely rearranges results
    for node in nodes:
        before = [n for n in node.all_input_nodes if n in group]
        depth[node] = max((depth[n] + (n in closed) for n in before), default=0)
        moves = is_view(node) or (before[:1] and before[0] in closed and _rearranges(node))
        if len(before) == 1 and (moves or node.target is operator.getitem):
            group[node], depth[node] = group[before[0]], depth[before[0]]
            closed.add(node)
            continue
        joins = [n for n in before if n not in closed and depth[n] == depth[node] and module_path(n) == module_path(node)]
        mine = [group[n] for n in joins] if node not in alone else []
        group[node] = mine[0] if mine else len(group)
        for other in mine[1:]:
            group.update({n: mine[0] for n, g in group.items() if g == other})
    return _without_cycles(nodes, group)


def _rearranges(node: fx.Node) -> bool:
    """Whether an operator moves or casts elements and computes nothing."""
    return is_view(node) or getattr(node.target, "_opname", "") in MOVES


def _without_cycles(nodes: list[fx.Node], group: dict[fx.Node, int]) -> dict[fx.Node, int]:
    """Nodes of groups that wait for each other are apart."""
    while True:
        edges: dict[int, set[int]] = {g: set() for g in group.values()}
        for node in nodes:
            edges[group[node]] |= {group[u] for u in node.users if u in group} - {group[node]}
        left = set(edges)
        while free := {g for g in left if not edges[g] & left or not any(g in edges[other] for other in left)}:
            left -= free
        split = next((g for g in left if sum(group[n] == g for n in nodes) > 1), None)
        if split is None:
            return group
        count = max(group.values()) + 1
        group.update({n: count + i for i, n in enumerate(n for n in nodes if group[n] == split)})


def _box(program: Program, block: str, nodes: list[fx.Node], alone: bool) -> Box:
    first, made = nodes[0], typed(nodes[0])
    where = module_path(first).removeprefix(block).lstrip(".")
    names = list(dict.fromkeys(_name(n) for n in nodes if n.target is not operator.getitem and not _rearranges(n)))
    names = names or [_name(first)]
    line = source_line(first)
    if made is not None:
        back = made.backward.comm if made.backward is not None else None
        title = f"{(made.forward.comm or 'identity').replace('_', '-')} over {'+'.join(made.axes)}"
        text = f"for {where or block}; backward: {(back or 'nothing').replace('_', '-')}"
        return Box(
            title,
            short(where, 2) if where else short(block),
            f"{text}\n{line}",
            COLOURS.get(strategy_of(first, made, program.mesh), "c5"),
            nodes,
        )
    weights = [layout_words(w) for w in _weights(first)] if alone else []
    title = f"{names[0]} {short(where, 1)}" if alone and where else short(where, 2) if where else " ".join(names[:2])
    text = "\n".join(filter(None, [", ".join(names[:9]), *(f"weight: {w}" for w in weights), line]))
    return Box(title, line.partition("  ")[0], text, "c0" if alone else "plain", nodes)


def _weights(node: fx.Node) -> list[fx.Node]:
    """The parameters that a product takes, as they are used."""
    return [n for n in node.all_input_nodes if if_local(n).layout_text and (n.op == "placeholder" or if_local(n).unshard)]


def _name(node: fx.Node) -> str:
    if node.target in ATTENTION or node.target is ring_attention:
        return "ring attention" if node.target is ring_attention else "attention"
    return str(getattr(node.target, "_opname", "") or getattr(node.target, "__name__", node.target))


def _tell_apart(boxes: list[Box]) -> None:
    """Parts of one module are called by what they compute, too."""
    plain = Counter(box.title for box in boxes if box.colour == "plain")
    for box in boxes:
        (computes, _, _), name = box.text.partition("\n"), box.title.rpartition(".")[2]
        if box.colour == "plain" and plain[box.title] > 1 and box.title != computes and len(name) < LONGEST - 4:
            box.title = f"{name}: {computes}"


def layout_words(node: fx.Node) -> str:
    """A value's layout: "batch/dp · seq/tp · hidden", with ", sums over tp" where each rank has a part of a sum; "" where it has
    none. Of what is gathered it follows from the parts, of the parts of a sum from the sum."""
    dims, missing = _dims(node)
    return " · ".join(map(str, dims)) + (f", sums over {'+'.join(missing)}" if missing and dims else "")


def _dims(node: fx.Node) -> tuple[list[DimWords], Axes]:
    """The dims of a value, and the axes along which each rank has a part of a sum."""
    text, made = if_local(node).layout_text, typed(node)
    if text:
        return dims_of_layout(text), ()
    if made is not None and made.gathers:
        return _without(_dims(made.value)[0], made.axes), ()
    if made is None and len(node.all_input_nodes) == 1 and _rearranges(node):
        found = _dims(node.all_input_nodes[0])
        if found[0]:
            return found
    if made is not None:  # it is added to what lies alike
        return next((dims_of_layout(if_local(u).layout_text) for u in node.users if if_local(u).layout_text), []), ()
    users = list(node.users)
    while len(users) == 1 and _rearranges(users[0]):
        users = list(users[0].users)
    sums = typed(users[0]) if users else None
    if sums is not None and sums.forward.comm in ("all_reduce", "reduce_scatter"):
        return _without(_dims(users[0])[0], sums.axes), sums.axes
    return [], ()


def _without(dims: list[DimWords], axes: Axes) -> list[DimWords]:
    return [DimWords(dim.name, tuple(a for a in dim.axes if a not in axes)) for dim in dims]


# ---- drawing ----


@dataclass(eq=False)
class _Vertex:
    """A box, or a bend of an edge that goes past others."""

    box: Box | None
    level: int
    x: float = 0.0
    above: list[_Vertex] = field(default_factory=list)
    below: list[_Vertex] = field(default_factory=list)

    @property
    def width(self) -> float:
        return WIDE if self.box is not None else 14.0


def _drawing(boxes: list[Box]) -> str:
    order = _levels(boxes)
    place = {box: _Vertex(box, box.level) for box in order}
    rows: list[list[_Vertex]] = [[] for _ in range(max(b.level for b in boxes) + 1)]
    for box in order:
        rows[box.level].append(place[box])
    paths: list[tuple[list[_Vertex], str]] = []
    for box in order:
        for other, layout in box.after.items():
            chain = [place[box]]
            for level in range(box.level + 1, other.level):
                bend = _Vertex(None, level)
                rows[level].append(bend)
                chain.append(bend)
            chain.append(place[other])
            for a, b in itertools.pairwise(chain):
                a.below.append(b)
                b.above.append(a)
            paths.append((chain, layout))
    _arrange(rows)
    right = max(p.x + p.width / 2 for row in rows for p in row)
    height = len(rows) * (HIGH + DOWN) - DOWN + 2 * MARGIN
    parts, layouts = [_edge(chain) for chain, _ in paths], []
    for box in order:
        labels = Counter(layout for layout in box.after.values() if layout)
        x, y = place[box].x, _top(box.level)
        parts.append(
            tag(
                "g",
                tag("rect", class_=f"box {box.colour}", x=x - WIDE / 2, y=y, width=WIDE, height=HIGH, rx=6),
                tag("text", words(_cut(box.title, LONGEST)), x=x, y=y + (17 if box.line else 24), class_="title"),
                tag("text", words(_cut(box.line, 31)), x=x, y=y + 31, class_="line"),
                data_t=f"{box.title}\n{box.text}",
            )
        )
        for i, layout in enumerate(labels):
            layouts.append(tag("text", words(layout), x=x + 7, y=y + HIGH + 13 + 11 * i, class_="layout"))
    return drawing(right + MARGIN + 80, height, *parts, *layouts, label="the graph of a block")


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _levels(boxes: list[Box]) -> list[Box]:
    """The boxes so that each comes behind what it waits for; sets their levels."""
    waits = Counter(other for box in boxes for other in box.after)
    ready, order = [b for b in boxes if not waits[b]], []
    while ready:
        box = ready.pop(0)
        order.append(box)
        for other in box.after:
            other.level = max(other.level, box.level + 1)
            waits[other] -= 1
            if not waits[other]:
                ready.append(other)
    return order


def _arrange(rows: list[list[_Vertex]]) -> None:
    """Give places their x: first an order with few crossings, then near what they are joined to, without overlaps."""
    for row in rows:
        for i, p in enumerate(row):
            p.x = float(i)
    for sweep in range(8):
        down = sweep % 2 == 0
        for row in rows if down else reversed(rows):
            near = {p: [q.x for q in (p.above if down else p.below)] for p in row}
            row.sort(key=lambda p: sum(near[p]) / len(near[p]) if near[p] else p.x)
            for i, p in enumerate(row):
                p.x = float(i)
    for row in rows:
        x = 0.0
        for p in row:
            p.x = x + p.width / 2
            x += p.width + ACROSS
    for sweep in range(12):
        for row in rows if sweep % 2 == 0 else reversed(rows):
            joined = {p: [q.x for q in [*p.above, *p.below]] for p in row}
            wish = [sum(joined[p]) / len(joined[p]) if joined[p] else p.x for p in row]
            _spread(row, wish)
    left = min(p.x - p.width / 2 for row in rows for p in row) - MARGIN
    for row in rows:
        for p in row:
            p.x -= left


def _spread(row: list[_Vertex], wish: list[float]) -> None:
    """Put places where they wish to be, moved apart as far as they overlap, evenly to both sides."""
    clusters: list[tuple[list[int], float]] = []
    for i in range(len(row)):
        clusters.append(([i], wish[i]))
        while len(clusters) > 1 and _right(row, clusters[-2]) + ACROSS > _left(row, clusters[-1]):
            (b, xb), (a, xa) = clusters.pop(), clusters.pop()
            clusters.append((a + b, (len(a) * xa + len(b) * xb) / (len(a) + len(b))))
    for members, centre in clusters:
        x = _left(row, (members, centre))
        for i in members:
            row[i].x = x + row[i].width / 2
            x += row[i].width + ACROSS


def _width(row: list[_Vertex], members: list[int]) -> float:
    return sum(row[i].width for i in members) + ACROSS * (len(members) - 1)


def _left(row: list[_Vertex], cluster: tuple[list[int], float]) -> float:
    return cluster[1] - _width(row, cluster[0]) / 2


def _right(row: list[_Vertex], cluster: tuple[list[int], float]) -> float:
    return cluster[1] + _width(row, cluster[0]) / 2


def _top(level: int) -> float:
    return MARGIN + level * (HIGH + DOWN)


def _edge(chain: list[_Vertex]) -> str:
    x, y = chain[0].x, _top(chain[0].level) + HIGH
    path = f"M{x:.1f} {y:.1f}"
    for p in chain[1:]:
        top = _top(p.level)
        middle = (y + top) / 2
        path += f" C{x:.1f} {middle:.1f} {p.x:.1f} {middle:.1f} {p.x:.1f} {top:.1f}"
        x, y = p.x, top
        if p.box is None:
            y = top + HIGH
            path += f" V{y:.1f}"
    return tag("path", class_="edge", d=path)

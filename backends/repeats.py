"""repeats: runs of equal blocks in a graph.

A model's list of equal layers is a stretch of operators that comes again and again. `find` proves it operator by operator:
targets, arguments and whatever the caller compares are equal, and so are the connections: to the same operator one period
earlier, to the same value outside, or to a value outside that moves on by one as well (a parameter and its cast, a gradient's
reduction). `fxpar.backends.periods` makes such runs shorter and longer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fxpar.backends.numbered import names

CANDIDATES = 12

Facts = Callable[[fx.Node], Hashable]
Place = tuple[int, int]
"""Of a node that repeats: its family, and its number in it."""


class NotEqual(Exception):
    """The graph does not repeat in a way that can be proved here."""


@dataclass
class Repeats:
    """Nodes that repeat: families of equal nodes, numbered by period.

    count: how many whole periods there are. place: of each member. families: number of the period -> member. region: the
    families (the first ones) whose members stand side by side, period by period; those of others are somewhere before or after.
    middle: the period behind which periods are put in (splits: for some families, another one).
    """

    graph: fx.Graph
    count: int
    region: int
    families: list[dict[int, fx.Node]]
    place: dict[fx.Node, Place]
    middle: int
    splits: dict[int, int] = field(default_factory=dict)

    def split(self, family: int) -> int:
        return self.splits.get(family, self.middle)


def find(graph: fx.Graph, facts: Facts, least: int) -> Repeats | None:
    """The first of `runs`, if there is one."""
    return next(iter(runs(graph, facts, least)), None)


def runs(graph: fx.Graph, facts: Facts, least: int) -> list[Repeats]:
    """Runs of at least `least` equal periods, of each period the longest; first the one that has most operators beyond the first
    of those. facts: what has to be equal, beside target and arguments, for two nodes to be.
    """
    nodes = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
    tokens = _tokens(graph, facts)
    found = []
    for period in periods_of([tokens[n] for n in nodes]):
        if period * least <= len(nodes) and (made := _Search(graph, nodes, tokens, period).run(least)) is not None:
            found.append(made)
    return sorted(found, key=lambda run: (run.count - least + 1) * run.region, reverse=True)


def _tokens(graph: fx.Graph, facts: Facts) -> dict[fx.Node, int]:
    """Numbers, equal for nodes that are equal but for the nodes that they refer to."""
    known: dict[Hashable, int] = {}
    out = {}
    for node in graph.nodes:
        target = node.op if node.op in ("placeholder", "output") else node.target
        key = (node.op, target, frozen(node.args), frozen(node.kwargs), facts(node))
        out[node] = known.setdefault(key, len(known))
    return out


def frozen(value: Any) -> Hashable:
    """An argument as it is, but for the nodes in it."""
    if isinstance(value, fx.Node):
        return "node"
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *map(frozen, value))
    if isinstance(value, dict):
        return tuple((k, frozen(v)) for k, v in value.items())
    if isinstance(value, slice):
        return ("slice", frozen(value.start), frozen(value.stop), frozen(value.step))
    return (type(value).__name__, repr(value))


def periods_of(tokens: Sequence[int]) -> list[int]:
    """Lengths that a period may have: the distances at which equal operators most often follow each other, and twice them."""
    votes: Counter[int] = Counter()
    last: dict[int, int] = {}
    for i, token in enumerate(tokens):
        if token in last:
            votes[i - last[token]] += 1
        last[token] = i
    found = [d for d, n in votes.most_common(CANDIDATES) if n > 2]
    return sorted({*found, *(2 * d for d in found)})


def written(graph: fx.Graph, facts: Facts) -> tuple[Hashable, dict[fx.Node, int]]:
    """A text that is equal for graphs of equal operators, with equal connections, in equal order; and the number that each node
    has in it. Placeholders, which may stand in any order, have theirs by their first use; one that no operator uses has none. The
    output is not in it."""
    nodes = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
    number = {n: i for i, n in enumerate(nodes)}
    for node in [r for n in nodes for r in references_of(n)]:
        number.setdefault(node, len(number))
    lines = [(n.op, n.target, frozen(n.args), frozen(n.kwargs), tuple(number[r] for r in references_of(n)), facts(n))
             for n in nodes]
    unused = sorted(str(facts(n)) for n in graph.find_nodes(op="placeholder") if n not in number)
    return (*lines, *(facts(n) for n in list(number)[len(nodes):]), *unused), number


def references_of(node: fx.Node) -> list[fx.Node]:
    """The nodes among the arguments, in order, each as often as it is there."""
    out: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), out.append)
    return out


class _Search:
    """Whether the operators repeat with one period."""

    def __init__(self, graph: fx.Graph, nodes: list[fx.Node], tokens: dict[fx.Node, int], period: int):
        self.graph, self.nodes, self.tokens, self.period = graph, nodes, tokens, period
        self.index = {n: i for i, n in enumerate(nodes)}
        self.follows: dict[fx.Node, fx.Node] = {}
        self.ends: list[tuple[fx.Node, fx.Node]] = []

    def run(self, least: int) -> Repeats | None:
        start, end = self._longest()
        count = (end - start) // self.period
        if count < least:
            return None
        self.start, self.end = start, end
        try:
            self._follow()
            made = self._families(count)
        except NotEqual:
            return None
        _tails(made, self.tokens)
        return made

    def _kinds(self, i: int) -> tuple[bool, ...] | None:
        """Of each reference of operator `i`, whether that of its successor is another node; None if the two are not equal."""
        a, b = self.nodes[i], self.nodes[i + self.period]
        if self.tokens[a] != self.tokens[b]:
            return None
        kinds = []
        for x, y in zip(references_of(a), references_of(b), strict=True):
            if x is not y:
                near = i - self.index.get(x, -len(self.nodes)), i + self.period - self.index.get(y, -len(self.nodes))
                if self.tokens[x] != self.tokens[y] or (max(near) < self.period and near[0] != near[1]):
                    return None
            kinds.append(x is not y)
        return tuple(kinds)

    def _longest(self) -> tuple[int, int]:
        """The longest stretch in which every operator is followed by an equal one a period later."""
        kinds = [self._kinds(i) for i in range(len(self.nodes) - self.period)]
        best, start = (0, 0), 0
        for i in range(len(kinds) + 1):
            if i < len(kinds) and kinds[i] is not None:
                if i - self.period < start or kinds[i] == kinds[i - self.period]:
                    continue
                new = i
            else:
                new = i + 1
            if i - start > best[1] - best[0]:
                best = start, i
            start = new
        return best[0], best[1] + self.period if best[1] else 0

    def _follow(self) -> None:
        """For what is outside of the stretch and referred to from inside: what follows it. The first of such, or the last, may
        refer to something that the others do not."""
        for i in range(self.start, self.end - self.period):
            for x, y in zip(references_of(self.nodes[i]), references_of(self.nodes[i + self.period]), strict=True):
                if x is not y:
                    self._match(x, y)
        after = {*self.follows.values()}
        if any(x in after and y in self.follows for x, y in self.ends):
            raise NotEqual

    def _in_region(self, node: fx.Node) -> bool:
        return self.start <= self.index.get(node, -1) < self.end

    def _match(self, x: fx.Node, y: fx.Node) -> None:
        """`y` is to one period what `x` is to that before."""
        if self._in_region(x) or self._in_region(y):
            if x not in self.index or y not in self.index or self.index[y] - self.index[x] != self.period:
                raise NotEqual
            return
        known = self.follows.get(x)
        if known is not None:
            if known is not y:
                raise NotEqual
            return
        if self.tokens[x] != self.tokens[y]:
            raise NotEqual
        self.follows[x] = y
        for a, b in zip(references_of(x), references_of(y), strict=True):
            if a is b:
                continue
            if self.tokens[a] != self.tokens[b] and not self._in_region(a) and not self._in_region(b):
                self.ends.append((x, y))  # a sum over blocks begins with something else
            else:
                self._match(a, b)

    def _families(self, count: int) -> Repeats:
        families: list[dict[int, fx.Node]] = [{} for _ in range(self.period)]
        place: dict[fx.Node, Place] = {}
        for i in range(self.start, self.end):
            number, slot = divmod(i - self.start, self.period)
            families[slot][number] = self.nodes[i]
            place[self.nodes[i]] = slot, number
        after = {y for y in self.follows.values()}
        if len(after) != len(self.follows):
            raise NotEqual
        first = self._first_used()
        for x in [x for x in self.follows if x not in after]:
            chain = [x]
            while chain[-1] in self.follows:
                chain.append(self.follows[chain[-1]])
            self._add(chain, first, families, place)
        if any(x not in place for x in self.follows):
            raise NotEqual  # a circle
        return Repeats(self.graph, count, self.period, families, place, (count - 1) // 2)

    def _first_used(self) -> dict[fx.Node, int]:
        """Of what is outside of the stretch: the first period that takes it, or else that of what is made of it."""
        first: dict[fx.Node, int] = {}
        for i in range(self.start, self.end):
            for x in references_of(self.nodes[i]):
                if not self._in_region(x):
                    first.setdefault(x, (i - self.start) // self.period)
        pending = list(first)
        for x in pending:
            more = [y for y in references_of(x) if not self._in_region(y) and y not in first]
            first |= dict.fromkeys(more, first[x])
            pending += dict.fromkeys(more)
        return first

    def _add(self, chain: list[fx.Node], first: dict[fx.Node, int], families: list[dict[int, fx.Node]],
             place: dict[fx.Node, Place]) -> None:
        """A family of nodes outside of the stretch; members that stand inside of it are of another family already."""
        if any(self._in_region(x) for x in chain):
            raise NotEqual
        middle = len(chain) // 2
        offset = first[chain[middle]] - middle
        families.append({offset + k: x for k, x in enumerate(chain)})
        for k, x in enumerate(chain):
            place[x] = len(families) - 1, offset + k


def _tails(repeats: Repeats, tokens: dict[fx.Node, int]) -> None:
    """Add families of what is made of members, equally of each, and stands outside of the stretch."""
    numbers: dict[Hashable, int] = {}
    classes: dict[int, dict[int, fx.Node]] = {}
    twice: set[int] = set()
    at = dict(repeats.place)
    for node in repeats.graph.nodes:
        if node in at or node.op in ("placeholder", "output"):
            continue
        references = references_of(node)
        base = next((at[r][1] for r in references if r in at), None)
        if base is None:
            continue
        key = tokens[node], tuple((at[r][0], at[r][1] - base) if r in at else r for r in references)
        made = numbers.setdefault(key, len(repeats.families) + len(numbers))
        members = classes.setdefault(made, {})
        if base in members:
            twice.add(made)
        members[base] = node
        at[node] = made, base
    for made, members in classes.items():
        low, high = min(members), max(members)
        if made in twice or len(members) < 3 or high - low != len(members) - 1:
            continue
        repeats.families.append({q: members[q] for q in sorted(members)})
        for q, node in members.items():
            repeats.place[node] = len(repeats.families) - 1, q


def add_inputs(repeats: Repeats, families: Iterable[dict[int, fx.Node]]) -> None:
    """Add families of inputs that no operator takes, of which the run itself shows nothing.

    families: of all inputs, numbered by period, as another graph shows them that has the same inputs.
    """
    for members in families:
        if not any(n in repeats.place or any(u.op != "output" for u in n.users) for n in members.values()):
            repeats.families.append(members)
            for q, node in members.items():
                repeats.place[node] = len(repeats.families) - 1, q


def check_names(repeats: Repeats) -> None:
    """Raise `NotEqual` unless the modules that the periods stand for are numbered as `lengthen` would number them."""
    for members in repeats.families[: repeats.region]:
        for q, key, stack in names(members):
            if [path for path, *_ in members[q].meta.get(key, {}).values()] != [path for path, *_ in stack.values()]:
                raise NotEqual

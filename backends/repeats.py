"""repeats: runs of equal blocks in a graph, made shorter or longer.

A model's list of equal layers is a stretch of operators that comes again and again. `find` proves it operator by operator:
targets, arguments and whatever the caller compares are equal, and so are the connections: to the same operator one period
earlier, to the same value outside, or to a value outside that moves on by one as well (a parameter and its cast, a gradient's
reduction). `shorten` takes periods out of the middle and `lengthen` puts copies there. What is at both ends stays, so that
whatever is special about the first blocks and the last ones remains as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fxpar.backends.numbered import names, number

ENDS = 1
"""How far from the first and from the last member of a family what is outside may refer to it."""
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


# ---- edits ----


def shorten(repeats: Repeats, periods: int) -> None:
    """Take `periods` of the run out of the graph, in place.

    Raises `NotEqual` (the graph is spoilt) if something else holds on to them.
    """
    kept: list[dict[int, fx.Node]] = []
    repeats.middle = (repeats.count - periods - 1) // 2
    gone: set[fx.Node] = set()
    for f, members in enumerate(repeats.families):
        at = repeats.split(f)
        gone |= {n for q, n in members.items() if at < q <= at + periods}
        kept.append({q if q <= at else q - periods: n for q, n in members.items() if n not in gone})
    _connect(repeats, kept)
    for node in reversed(list(repeats.graph.nodes)):
        if node in gone:
            if node.users:
                raise NotEqual
            repeats.graph.erase_node(node)


def lengthen(repeats: Repeats, periods: int) -> dict[tuple[fx.Node, int], fx.Node]:
    """Put `periods` more of the run into the graph, in place; the new nodes, by what they are copies of and how much further on.

    What the middle of the run returns, the new periods return too; they are members of the run's families. Raises `NotEqual` (the
    graph is spoilt) if something outside refers to the middle otherwise, so that it could not be said to what it would refer in a
    longer run.
    """
    graph, made = repeats.graph, {}
    returned: Any = list(repeats.graph.output_node().args[0])  # type: ignore[arg-type]
    _check_ends(repeats, {n for n in returned if isinstance(n, fx.Node)})
    full: list[dict[int, fx.Node]] = []
    for f, members in enumerate(repeats.families):
        at = repeats.split(f)
        full.append({q if q <= at else q + periods: n for q, n in members.items()})
    inside = list(range(repeats.region))
    last = repeats.families[0][repeats.middle + 1]
    blocks = [(inside, last, True)]
    for positions, rising in _groups(repeats, [n for n in graph.nodes if repeats.place.get(n, (-1, 0))[0] >= repeats.region]):
        blocks.append(([repeats.place[n][0] for n in positions], positions[-1].next if rising else positions[0], rising))
    for families, before, rising in blocks:
        with graph.inserting_before(before):
            for r in _steps(periods, rising):
                for f in families:
                    template = repeats.families[f][repeats.split(f)]
                    new = made[template, r] = graph.node_copy(template)
                    new.meta = dict(template.meta)
                    new.target = new.name if new.op == "placeholder" else new.target
                    full[f][repeats.split(f) + r] = new
    _connect(repeats, full)
    for members in full:
        number(members)
    for nodes, rising in _groups(repeats, [n for n in returned if isinstance(n, fx.Node)]):
        more = [made[n, r] for r in _steps(periods, rising) for n in nodes]
        at = returned.index(nodes[-1]) + 1 if rising else returned.index(nodes[0])
        returned[at:at] = more
    graph.output_node().args = (tuple(returned),)
    repeats.families = full
    repeats.place = {n: (f, q) for f, members in enumerate(full) for q, n in members.items()}
    return made


def align(forward: Repeats, backward: Repeats, kept: dict[fx.Node, fx.Node]) -> None:
    """Have the backward graph's run be cut where the forward graph's is: as near to its middle as both runs have it.

    kept: of each placeholder of the backward graph that the forward graph fills, which of its nodes does. The backward runs from
    the last block to the first, so that what a period takes is of one block before that of the period before.
    """
    totals: dict[int, int] = {}
    for f, members in enumerate(backward.families):
        if next(iter(members.values())).op != "placeholder":
            continue
        fill = {q: kept[n] for q, n in members.items() if n in kept}
        sums = {(forward.place[x][0], forward.place[x][1] + q) for q, x in fill.items() if x in forward.place}
        if len(fill) < len(members) or len(sums) != 1:
            raise NotEqual
        family, total = next(iter(sums))
        if any(forward.families[family].get(total - q, x) is not x for q, x in fill.items()):
            raise NotEqual
        totals[f] = total
    if not totals:
        raise NotEqual
    cuts = [at for at in range(forward.count - 1)
            if all({total - at - 1, total - at} <= {*backward.families[f]} for f, total in totals.items())]
    forward.middle = min(cuts, key=lambda at: abs(at - forward.middle), default=forward.middle)
    backward.splits |= {f: total - forward.middle - 1 for f, total in totals.items()}


def _steps(periods: int, rising: bool) -> Iterable[int]:
    return range(1, periods + 1) if rising else range(periods, 0, -1)


def _groups(repeats: Repeats, nodes: list[fx.Node]) -> list[tuple[list[fx.Node], bool]]:
    """Of the nodes that are the last ones before the middle: those that stand together, and whether those of later periods come
    after them (or before them)."""
    near: list[tuple[int, fx.Node]] = []
    for n in nodes:
        if n in repeats.place:
            f, q = repeats.place[n]
            if abs(q - repeats.split(f)) <= 1:
                near.append((q - repeats.split(f), n))
    out: list[tuple[list[fx.Node], bool]] = []
    i = 0
    while i < len(near):
        if near[i][0] != 0:
            i += 1
            continue
        j = i
        while j < len(near) and near[j][0] == 0:
            j += 1
        rising = near[j][0] > 0 if j < len(near) else i == 0 or near[i - 1][0] < 0
        out.append(([n for _, n in near[i:j]], rising))
        i = j
    return out


def _offsets(repeats: Repeats, f: int) -> list[Place | None]:
    """Of each reference of a family's members: the family that it moves on in, and how far ahead; None of what stays."""
    members, at = repeats.families[f], repeats.split(f)
    if at not in members or at + 1 not in members:
        raise NotEqual
    out: list[Place | None] = []
    for x, y in zip(references_of(members[at]), references_of(members[at + 1]), strict=True):
        if x is not y and x not in repeats.place:
            raise NotEqual
        out.append(None if x is y else (repeats.place[x][0], repeats.place[x][1] - at))
    for q, node in members.items():
        for offset, x in zip(out, references_of(node), strict=True):
            if offset is not None:
                family, ahead = offset
                if repeats.families[family].get(q + ahead, x) is not x:
                    raise NotEqual
    return out


def _connect(repeats: Repeats, families: list[dict[int, fx.Node]]) -> None:
    """Have every member refer to what its number says. families: as they are to be."""
    offsets = [_offsets(repeats, f) for f in range(len(families))]
    for f, members in enumerate(families):
        for q, node in members.items():
            wanted = []
            for offset, x in zip(offsets[f], references_of(node), strict=True):
                wanted.append(x if offset is None else families[offset[0]].get(q + offset[1], x))
            feed = iter(wanted)
            node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: next(feed))  # noqa: B023


def _check_ends(repeats: Repeats, returned: set[fx.Node]) -> None:
    for node in repeats.graph.nodes:
        own = repeats.place.get(node)
        if node.op == "output":
            continue
        references = references_of(node)
        stays = [True] * len(references) if own is None else [o is None for o in _offsets(repeats, own[0])]
        for fixed, x in zip(stays, references, strict=True):
            if fixed and x in repeats.place and not _at_an_end(repeats, x):
                raise NotEqual
    for f, members in enumerate(repeats.families):
        at = repeats.split(f)
        if at not in members or at + 1 not in members:
            raise NotEqual
        through = members[at] in returned and members[at + 1] in returned
        if not through and any(n in returned and not _at_an_end(repeats, n) for n in members.values()):
            raise NotEqual


def _at_an_end(repeats: Repeats, node: fx.Node) -> bool:
    f, q = repeats.place[node]
    numbers = repeats.families[f]
    return min(q - min(numbers), max(numbers) - q) <= ENDS


def check_names(repeats: Repeats) -> None:
    """Raise `NotEqual` unless the modules that the periods stand for are numbered as `lengthen` would number them."""
    for members in repeats.families[: repeats.region]:
        for q, key, stack in names(members):
            if [path for path, *_ in members[q].meta.get(key, {}).values()] != [path for path, *_ in stack.values()]:
                raise NotEqual

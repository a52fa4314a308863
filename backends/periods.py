"""periods: runs of equal blocks made shorter or longer.

`shorten` takes periods out of the middle of a run that `repeats` found, and `lengthen` puts copies there. What is at both ends
stays, so that whatever is special about the first blocks and the last ones remains as it is.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from typing import Any

from torch import fx

from fxpar.backends.numbered import number
from fxpar.backends.repeats import NotEqual, Place, Repeats, references_of

ENDS = 1
"""How far from the first and from the last member of a family what is outside may refer to it."""


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
    _settle_splits(repeats)
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


def _settle_splits(repeats: Repeats) -> None:
    """Have families outside of the stretch that refer to each other be cut at one place of the graph, in the middle of most: what
    is made again of a block is numbered by the block that takes it first, and may stand before or behind what has its number."""
    at = {n: i for i, n in enumerate(repeats.graph.nodes)}
    for families in _connected(repeats):
        stands = {f: sorted((at[n], q) for q, n in repeats.families[f].items()) for f in families}
        cuts = [cut for cut in ({f: _split_before(stands[f], i) for f in families}
                                for i in sorted({i for some in stands.values() for i, _ in some})) if None not in cut.values()]
        if cuts:
            best = max(cuts, key=lambda cut: sum(q == repeats.middle for q in cut.values()))
            repeats.splits |= {f: q for f, q in best.items() if q is not None}


def _connected(repeats: Repeats) -> Iterable[list[int]]:
    """The families outside of the stretch that have operators, in sets that refer to each other."""
    outside = [f for f in range(repeats.region, len(repeats.families))
               if f not in repeats.splits and next(iter(repeats.families[f].values())).op != "placeholder"]
    near: dict[int, set[int]] = {f: set() for f in outside}
    for f in outside:
        for g in [place[0] for place in _offsets(repeats, f) if place is not None and place[0] in near]:
            near[f].add(g)
            near[g].add(f)
    seen: set[int] = set()
    for f in outside:
        if f not in seen:
            together = [f]
            for x in together:
                together += near[x].difference(together)
            seen.update(together)
            yield together


def _split_before(stands: list[tuple[int, int]], place: int) -> int | None:
    """The lower number of the two members of a family that stand on both sides of a place. stands: where each member does."""
    i = bisect.bisect_left(stands, (place, -1))
    if not 0 < i < len(stands) or abs(stands[i][1] - stands[i - 1][1]) != 1:
        return None
    return min(stands[i][1], stands[i - 1][1])


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

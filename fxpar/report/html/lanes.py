"""lanes: a forward and a backward of one microbatch on a clock: a lane for what is computed, and one for each strategy that
communicates. Times are those of the cost model (fxpar/cost/stages.py), in which collectives of activations are waited for, and
those of parameters and their gradients run beside computation where the plan has them do so."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from fxpar.cost.clusters import Cluster
from fxpar.cost.stages import OperatorTimes
from fxpar.ops.collectives import typed
from fxpar.passes.partition.phases import beside_computation, once_a_step
from fxpar.program import Program, block_path, module_path, user_line
from fxpar.report.html.svg import bar, drawing, legend, tag, words
from fxpar.report.traffic import gathered_again, returned_bytes, sent_around, strategy_of
from fxpar.report.words import seconds, short, size
from fxpar.sharding.facts import local_value
from fxpar.sharding.mesh import Axes

COMPUTE = "compute"
LEFT, RIGHT, ROW, BAR, TOP, WIDTH = 78.0, 12.0, 30.0, 20.0, 24.0, 1080.0
COLOURS = {"compute": "c0", "tp": "c1", "cp": "c2", "ep": "c3", "zero": "c4", "dp": "c5"}


Rings = dict[fx.Node, tuple[Axes, tuple[int, int], tuple[float, float]]]
"""Ring attention -> the axes that its keys and values go round, and the bytes and seconds of that, forward and backward."""


@dataclass(frozen=True)
class Event:
    """Something that takes time. lane: "compute", or a strategy. block: of the model, in which it is. where: its module."""

    lane: str
    start: float
    end: float
    text: str
    block: str
    where: str


def events(program: Program, cluster: Cluster) -> tuple[list[Event], list[Event]]:
    """Those of the forward, and of the backward, each from 0 on."""
    clock, again = OperatorTimes(cluster, program), gathered_again(program)
    times = {node: clock.seconds(node) for node in clock.costs}
    rings = {node: (axes, (there, back), clock.travels(node)) for node, axes, there, back in sent_around(program)}
    once, beside = once_a_step(program), beside_computation(program)
    nodes = [n for n in program.graph.nodes if n in times]
    ahead = _Lanes(program)
    for node in nodes:
        if node not in once[0]:
            ahead.add(node, times[node][0], node in beside[0], "forward")
            ahead.round(node, rings, 0, times[node][0])
    back = _Lanes(program)
    if program.training:
        for node in reversed(nodes):
            if node in again:
                back.add(node, times[node][0], node in beside[0], "forward", "gathered again: ")
            if node not in once[1]:
                back.add(node, times[node][1], node in beside[1], "backward", late=True)
                back.round(node, rings, 1, times[node][1])
    return ahead.events, back.events


class _Lanes:
    """Events that follow one another. now: when what is computed next can begin."""

    def __init__(self, program: Program):
        self.program, self.now = program, 0.0
        self.events: list[Event] = []
        self.free: dict[str, float] = {}
        self.begun = [0.0, 0.0]
        self.block = ""

    def add(self, node: fx.Node, takes: float, beside: bool, phase: str, said: str = "", late: bool = False) -> None:
        """beside: it runs beside computation: as early as one block ahead of its use, or, `late`, as long as nobody waits."""
        if takes <= 0:
            return
        block, made = block_path(node), typed(node)
        if block != self.block:
            self.block, self.begun = block, [self.begun[1], self.now]
        lane = COMPUTE if made is None else strategy_of(node, made, self.program.mesh)
        if made is None or not beside:
            start = max(self.now, self.free.get(lane, 0.0))
            self.now = start + takes
        else:
            start = max(self.free.get(lane, 0.0), self.now if late else self.begun[0])
            self.now = self.now if late else max(self.now, start + takes)
        self.free[lane] = start + takes
        where = module_path(node)
        if made is None:
            name = getattr(node.target, "_opname", None) or getattr(node.target, "__name__", str(node.target))
            text = f"{name} of {short(where)}: {seconds(takes)}"
        else:
            direction = made.forward if phase == "forward" or made.backward is None else made.backward
            moved = (
                local_value(node).bytes
                if phase == "forward"
                else returned_bytes(node, made, self.program.mesh)
            )
            text = (
                f"{said}{direction.comm} over {'+'.join(made.axes)} for {where or 'the model'}: {size(moved)}, {seconds(takes)}"
            )
        line = source_line(node)
        self.events.append(Event(lane, start, start + takes, f"{text}\n{line}" if line else text, block, where))

    def round(self, node: fx.Node, rings: Rings, phase: int, takes: float) -> None:
        """Of ring attention, which was just added and takes so long: its keys and values travel meanwhile."""
        if node not in rings or takes <= 0:
            return
        axes, moved, travels = rings[node]
        end, where, line = self.now - takes + min(takes, travels[phase]), module_path(node), source_line(node)
        text = f"keys and values go round over {'+'.join(axes)} for {where or 'the model'}: "
        text += f"{size(moved[phase])}, {seconds(travels[phase])}"
        self.events.append(Event("cp", self.now - takes, end, f"{text}\n{line}" if line else text, block_path(node), where))


def source_line(node: fx.Node) -> str:
    """The user's line that made a value, without the folders that lead to its file."""
    file, _, rest = user_line(node).partition(":")
    number, _, code = rest.partition("  ")
    return f"{file.rpartition('/')[2]}:{number}  {code}" if number else ""


def drawn(program: Program, cluster: Cluster) -> str:
    """Both passes as they follow one another; and the layer in the middle of them, closer."""
    forward, backward = events(program, cluster)
    if not forward:
        return tag("p", "Nothing in this program takes time.")
    end = max(e.end for e in forward)
    shifted = [Event(e.lane, e.start + end, e.end + end, e.text, e.block, e.where) for e in backward]
    both = [*forward, *shifted]
    lanes = [lane for lane in (*COLOURS, *sorted({e.lane for e in both} - {*COLOURS})) if any(e.lane == lane for e in both)]
    total = max(e.end for e in both)
    marks = [(0.0, f"forward, {seconds(end)}")] + ([(end, f"backward, {seconds(total - end)}")] if backward else [])
    out = [
        legend([(_colour(lane), lane if lane == COMPUTE else f"{lane} communication") for lane in lanes]),
        tag("div", _drawing(_joined(both, "block"), lanes, 0.0, total, marks), class_="wide"),
    ]
    blocks = list(dict.fromkeys(e.block for e in forward if e.block))
    if blocks:
        middle = blocks[len(blocks) // 2]
        for name, phase in (("forward", forward), ("backward", shifted)):
            mine = [e for e in phase if e.block == middle]
            if mine:
                first, last = min(e.start for e in mine if e.lane == COMPUTE), max(e.end for e in mine if e.lane == COMPUTE)
                inside = [e for e in phase if e.end > first and e.start < last]
                out += [
                    tag("h3", words(f"The {name} of {middle}, closer")),
                    tag(
                        "div",
                        _drawing(_joined(inside, "where"), lanes, first, last, [(first, seconds(last - first))]),
                        class_="wide",
                    ),
                ]
    return "".join(out)


def _colour(lane: str) -> str:
    return COLOURS.get(lane, "c5")


def _joined(found: list[Event], by: str) -> list[Event]:
    """Neighbours of one block, or module, that are computed, as one bar; collectives one by one."""
    out: list[Event] = []
    for event in found:
        if event.lane != COMPUTE:
            out.append(event)
            continue
        before = next((e for e in reversed(out) if e.lane == COMPUTE), None)
        name = getattr(event, by)
        if before is not None and getattr(before, by) == name and event.start - before.end < 1e-9:
            out[out.index(before)] = Event(COMPUTE, before.start, event.end, "", before.block, before.where)
        else:
            out.append(Event(COMPUTE, event.start, event.end, "", event.block, event.where))
    return [
        e
        if e.text
        else Event(
            e.lane,
            e.start,
            e.end,
            f"{getattr(e, by) or e.where or 'the model'}: computes {seconds(e.end - e.start)}",
            e.block,
            e.where,
        )
        for e in out
    ]


def _drawing(found: list[Event], lanes: list[str], first: float, last: float, marks: list[tuple[float, str]]) -> str:
    scale = (WIDTH - LEFT - RIGHT) / ((last - first) or 1.0)
    parts = []
    for begin, text in marks:
        x = LEFT + (begin - first) * scale
        parts.append(tag("path", class_="axis", d=f"M{x:.1f} {TOP - 16} V{TOP + ROW * len(lanes)}"))
        parts.append(tag("text", words(text), class_="tick", x=x + 5, y=TOP - 7))
    names: dict[str, int] = {}
    for row, lane in enumerate(lanes):
        y = TOP + row * ROW
        parts.append(tag("text", words(lane), class_="lane", x=LEFT - 10, y=y + BAR / 2 + 4, text_anchor="end"))
        parts.append(tag("rect", class_="rail", x=LEFT, y=y, width=WIDTH - LEFT - RIGHT, height=BAR))
        for event in (e for e in found if e.lane == lane):
            start, end = max(event.start, first), min(event.end, last)
            place = event.block if lane == COMPUTE and event.block else event.where
            shade = " light" if lane == COMPUTE and names.setdefault(place, len(names)) % 2 else ""
            parts.append(
                bar(
                    LEFT + (start - first) * scale,
                    y,
                    (end - start) * scale,
                    BAR,
                    _colour(lane) + shade,
                    event.text,
                    _label(event),
                )
            )
    return drawing(WIDTH, TOP + ROW * len(lanes) + 2, *parts, label="what is computed and communicated, on a clock")


def _label(event: Event) -> str:
    if event.lane == COMPUTE:
        return short(event.where, 1) if event.text.startswith(f"{event.where}:") else event.block or short(event.where)
    return short(event.where, 1)

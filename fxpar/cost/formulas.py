"""formulas: what a step takes under any plan, in closed form: seconds and bytes of a rank, as functions of the plan's degrees.

The formulas are those of `stages`, of a model whose operators all split evenly: they are exact where a model is made of
equal blocks whose every dim divides, and estimates elsewhere. What is known of a model are sums over its operators on one
device (`PER_SEQUENCE`, `NUMBERS`: see `fxpar.choose.facts`); of a cluster its links, chosen by how far a group of ranks
reaches. `seconds` and `memory` are sympy expressions, to be read, printed and derived; `compiled` makes of them functions of
arrays, so that a hundred thousand plans take a second.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import sympy
from sympy import Expr, Symbol

from fxpar.cost.stages import (
    AGAIN,
    ATTENDING,
    BUBBLE,
    CONTEXT,
    DATA,
    EXPERTS,
    OPTIMIZER,
    OTHERS,
    PRODUCTS,
    TENSOR,
)

PLAN = dict(dp="data parallel ranks", tp="tensor parallel ranks", cp="context parallel ranks", pp="pipeline ranks",
            ep="ranks of experts", m="microbatches", v="stages of a pipeline rank", b="sequences of a microbatch",
            rep="replicas of hybrid sharding", z1="1 under zero=1 and above, or else 0", z2="the same of zero=2", z3="of zero=3",
            again="the part of the blocks' forward that the backward makes again", a2a="1 where cp exchanges heads, or else 0",
            uneven="what the largest pipeline rank computes, over the average")
"""Symbols of a plan."""
PER_SEQUENCE = dict(t_products="seconds of matrix products", t_attention="of attention", t_others="of other operators",
                    t_again="of the blocks' forward", tp_forward="bytes that tp gathers and scatters, forward",
                    tp_backward="the same, backward", ring="bytes of keys and values",
                    heads="bytes of queries, keys, values and results",
                    rows="bytes of rows sent to their experts, and back, forward", hop="bytes that cross a cut",
                    kept_blocks="bytes that the blocks keep for the backward", kept_end="the same of what comes behind them",
                    room_block="bytes that one block needs while it runs", room_end="the same of what comes behind them",
                    **{f"{name}_tp": "what it is more on two ranks of tp" for name in (
                        "kept_blocks", "kept_end", "room_block", "room_end")},
                    **{f"{name}_gathered": "what each further rank of tp adds" for name in ("kept_blocks", "kept_end")})
"""Symbols of a model, for each sequence of the batch, on one device; bytes kept, and of room, under the plan's recomputation."""
NUMBERS = dict(tensors="parameter tensors", n_split="parameters that tp splits", n_same="parameters that it does not",
               n_expert="parameters of experts",
               blocks="blocks", attentions="operators of attention", tp_count="collectives over tp of a forward and a backward",
               ep_count="the same of exchanges with experts", stored="bytes that a parameter is stored in",
               used="bytes that it is used in", summed="bytes that its gradient is summed in", copied="1 where it is cast")
"""Symbols of a model that do not grow with the batch."""
CLUSTER = dict(bandwidth="bytes a second of a device's memory",
               **{f"{kind}_{axis}": text for axis in ("tp", "cp", "ep", "dp", "rep", "pp")
                  for kind, text in (("alpha", f"seconds of a message over {axis}"), ("beta", f"bytes a second over {axis}"))})
"""Symbols of a cluster, by the link that a group of ranks communicates over."""
SYMBOLS = {name: Symbol(name, nonnegative=True) for names in (PLAN, PER_SEQUENCE, NUMBERS, CLUSTER) for name in names}
"""Name -> symbol, with its meaning in the four tables above."""

_S = SYMBOLS
dp, tp, cp, pp, ep, m, v, b, rep = (_S[name] for name in ("dp", "tp", "cp", "pp", "ep", "m", "v", "b", "rep"))
z1, z2, z3 = _S["z1"], _S["z2"], _S["z3"]


def larger(*of: Expr | int) -> Expr:
    """As it stands: sympy's own attempt to decide which it is takes a second."""
    return sympy.Max(*of, evaluate=False)


def smaller(*of: Expr | int) -> Expr:
    return sympy.Min(*of, evaluate=False)


def _share(n: Expr) -> Expr:
    """The part of a whole that a rank of n receives from the others."""
    return (n - 1) / n


def dense() -> Expr:
    """Parameters, but for experts, that a rank computes with."""
    return (_S["n_split"] / tp + _S["n_same"]) / pp


def experts() -> Expr:
    """Parameters of experts that it computes with."""
    return _S["n_expert"] / (pp * larger(ep, tp))


def shards() -> Expr:
    """How many ranks share the storage of a parameter that is no expert's."""
    return 1 + z1 * (dp * cp / rep - 1)


def stored() -> Expr:
    """Parameters that a rank stores."""
    whole = larger(ep, tp)
    return dense() / shards() + experts() / (1 + z1 * (larger(1, dp * cp * tp / (whole * rep)) - 1))


def added() -> Expr:
    """Bytes that adding a microbatch's gradients to the sum of those before reads and writes."""
    unreduced = (1 - z2) * smaller(1, dp * cp - 1)
    wide = 3 * _S["summed"] + z1 * _S["copied"] * (_S["used"] + _S["summed"])
    return unreduced * wide * (dense() + experts()) + (1 - unreduced) * 3 * _S["stored"] * stored()


def bubble(schedule: str) -> Expr:
    """The part of a pipeline's step in which a rank waits for others, where forward, I and W take the same time."""
    filled = {"1f1b": m, "gpipe": m, "interleaved1f1b": v * m, "zb1p": 3 * v * m, "zbv": 6 * m}[schedule]
    waited = smaller(m, pp) - 1 + v * larger(0, pp - m) if schedule == "interleaved1f1b" else pp - 1
    return waited / (filled + waited)


def alive(schedule: str) -> Expr:
    """How many microbatches the first pipeline rank holds at most, in units of what one keeps on all of its stages."""
    return {"gpipe": m, "interleaved1f1b": smaller(m, ((v - 1) * pp + 2 * (pp - 1) + 1) / v)}.get(schedule, smaller(m, pp))


def seconds(schedule: str) -> dict[str, Expr]:
    """What a step's seconds are for (see `fxpar.cost.stages.TERMS`), on the pipeline rank that computes longest."""
    part = b * m * _S["uneven"] / pp
    split = part / (tp * cp)
    out: dict[str, Expr] = {PRODUCTS: split * _S["t_products"], ATTENDING: split * _S["t_attention"],
                            OTHERS: split * _S["t_others"] + (m - 1) * added() / _S["bandwidth"],
                            AGAIN: split * _S["again"] * _S["t_again"]}
    both = 1 + _S["again"]
    size = both * _S["tp_forward"] + _S["tp_backward"]
    out[TENSOR] = (_share(tp) * part / cp * size / _S["beta_tp"]
                   + (tp - 1) * _S["alpha_tp"] * part / b * (1 + both) / 2 * _S["tp_count"])
    out[CONTEXT] = m * _S["uneven"] / pp * ((1 - _S["a2a"]) * _ring(both) + _S["a2a"] * _exchange(both))
    out[EXPERTS] = (_share(ep) * split * (1 + both) * _S["rows"] / _S["beta_ep"]
                    + (ep - 1) * _S["alpha_ep"] * part / b * (1 + both) / 2 * _S["ep_count"])
    computing = sum(out.values(), sympy.Integer(0))
    each, once = _data(computing)
    out[DATA] = each + (once if schedule == "" else 0)
    busy = computing + each
    if schedule == "":
        out[BUBBLE] = sympy.Integer(0)
    else:
        waits = bubble(schedule)
        messages = 2 * (pp - 1) * (_S["alpha_pp"] + b * _S["hop"] / (tp * cp * _S["beta_pp"]))
        out[BUBBLE] = busy * waits / (1 - waits) + messages + larger(once / v, once - busy * (v - 1) / (v * m))
    out[OPTIMIZER] = 7 * _S["stored"] * stored() / _S["bandwidth"]
    return out


def _ring(both: Expr) -> Expr:
    """Seconds of keys and values that go round, of all layers and one microbatch, and are longer under way than attention hides.
    Attention's forward is two of its seven products; backward gradients in float32 go with keys and values."""
    sent = b * _S["ring"] / (tp * cp) * (cp - 1)
    hidden = _share(cp) * b * _S["t_attention"] / (tp * cp)
    turn = (cp - 1) * _S["alpha_cp"] * _S["attentions"]
    forward = larger(0, turn + sent / _S["beta_cp"] - hidden * sympy.Rational(2, 7))
    backward = larger(0, turn + 3 * sent / _S["beta_cp"] - hidden * sympy.Rational(5, 7))
    return both * forward + backward


def _exchange(both: Expr) -> Expr:
    """Seconds of the four exchanges of each attention, there and back."""
    size = b * _S["heads"] / (tp * cp) * _share(cp)
    return (1 + both) * (size / _S["beta_cp"] + 4 * (cp - 1) * _S["alpha_cp"] * _S["attentions"])


def _data(computing: Expr) -> tuple[Expr, Expr]:
    """Seconds of parameters' gathers and gradients' sums that are not hidden: those of all microbatches, and those that a step
    has once. Gathers and sums run beside computation: forward, a third of it, and backward."""
    n, used, summed = dp * cp / rep, dense() + experts(), _S["summed"]
    turns = _S["tensors"] / pp
    gather = _share(n) * _S["used"] * used / _S["beta_dp"] + turns * (n - 1) * _S["alpha_dp"]
    scatter = _share(n) * summed * used / _S["beta_dp"] + turns * (n - 1) * _S["alpha_dp"]
    across = 2 * (_share(rep) * summed * used / (n * _S["beta_rep"]) + turns * (rep - 1) * _S["alpha_rep"])
    whole = 2 * (_share(dp * cp) * summed * used / _S["beta_dp"] + turns * (dp * cp - 1) * _S["alpha_dp"])
    forward, backward = computing / 3, 2 * computing / 3
    each = (z3 * larger(0, m * gather - forward)
            + z2 * larger(0, m * (scatter + across + z3 * gather) - backward))
    last = z1 * (1 - z2) * (scatter + across) + (1 - z1) * whole
    return each, larger(0, last - backward / m) + (z1 - z3) * larger(0, gather)


def memory(schedule: str) -> dict[str, Expr]:
    """What the bytes of a rank at its peak are for, by the names of `fxpar.report.memory.PARTS`; of the pipeline rank that has
    most: the first, whose microbatches are alive longest, or the last, which has what comes behind the blocks."""
    used, data = dense() + experts(), smaller(1, dp * cp - 1)
    unreduced = (1 - z2) * smaller(1, m - 1) * data * _S["summed"] * used
    several = smaller(1, m - 1)
    gathered = z1 * (1 - z3) * data + (1 - z1 * data) * _S["copied"]
    blocks = b * _activations("kept_blocks") / (pp * tp * cp)
    first = blocks * (1 if schedule == "" else alive(schedule))
    end = b * (_activations("kept_end") + _activations("room_end")) / (tp * cp)
    room = b * _activations("room_block") / (tp * cp)
    most = larger(first + room + (end - room if schedule == "" else 0), first + room, blocks + end)
    made = _S["stored"] * stored()
    return {"parameters": made, "optimizer": 2 * made,
            "gradients": larger(unreduced, several * made) + (1 - several) * made * sympy.Rational(1, 4),
            "parameter copies": _S["used"] * used * (gathered + z3 * smaller(1, 3 * pp / _S["blocks"])),
            "activations": most}


def _activations(name: str) -> Expr:
    """Bytes of one sequence, over all ranks that share it: of what tp gathers, each holds the whole."""
    return (_S[name] + smaller(1, tp - 1) * _S[f"{name}_tp"]
            + larger(0, tp - 2) * _S.get(f"{name}_gathered", sympy.Integer(0)))


@functools.cache
def compiled(schedule: str) -> tuple[Callable[..., dict[str, Any]], Callable[..., dict[str, Any]]]:
    """`seconds` and `memory` as functions of the symbols' values by name: numbers, or arrays of one length. schedule: "" for
    plans without a pipeline."""
    return _function(seconds(schedule)), _function(memory(schedule))


def _function(terms: Mapping[str, Expr]) -> Callable[..., dict[str, Any]]:
    names = list(SYMBOLS)
    modules = [{"Max": lambda *a: functools.reduce(np.maximum, a), "Min": lambda *a: functools.reduce(np.minimum, a)}, "numpy"]
    made = sympy.lambdify([SYMBOLS[name] for name in names], list(terms.values()), modules=modules, cse=True)
    return lambda **values: dict(zip(terms, made(*(values[name] for name in names)), strict=True))


def explained(schedule: str = "") -> str:
    """All formulas as text, one a line."""
    both = {"seconds": seconds(schedule), "bytes": memory(schedule)}
    return "\n".join(f"{what} of {term}: {expr}" for what, terms in both.items() for term, expr in terms.items())

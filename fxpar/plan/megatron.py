"""Megatron Core's command line, as fields of a `Plan`.

One table, `_FLAGS`, lists the flags that are understood and what each takes. Flags that set one field
directly name it there; the others are read by the functions in `_DERIVED`. A flag that is not given keeps
fxpar's default where that changes speed alone (overlap, the expert dispatcher), and means what it means to
Megatron where it changes how values are split (sequence parallelism).
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Callable, Sequence
from typing import Any

from fxpar.errors import PlanError

# Megatron's names for `Plan.zero`; the position is the stage.
ZERO_NAMES = ("no_shard", "optim", "optim_grads", "optim_grads_params")

# What a flag takes: nothing (a switch), a positive number, or words (one, or as many as follow).
_SWITCH, _NUMBER, _WORD, _WORDS = "switch", "number", "word", "words"

# Flag -> what it takes, and the plan's field it sets as it is (None: used below, or no matter to a plan).
_FLAGS: dict[str, tuple[str, str | None]] = {
    "--tensor-model-parallel-size": (_NUMBER, "tp"),
    "--pipeline-model-parallel-size": (_NUMBER, "pp"),
    "--context-parallel-size": (_NUMBER, "cp"),
    "--expert-model-parallel-size": (_NUMBER, "ep"),
    "--expert-tensor-parallel-size": (_NUMBER, None),
    "--sequence-parallel": (_SWITCH, "sequence_parallel"),
    "--use-distributed-optimizer": (_SWITCH, None),
    "--use-megatron-fsdp": (_SWITCH, None),
    "--use-custom-fsdp": (_SWITCH, None),
    "--use-torch-fsdp2": (_SWITCH, None),
    "--data-parallel-sharding-strategy": (_WORD, None),
    "--num-distributed-optimizer-instances": (_NUMBER, "dp_replicate"),
    "--num-layers": (_NUMBER, None),
    "--num-layers-per-virtual-pipeline-stage": (_NUMBER, None),
    "--num-virtual-stages-per-pipeline-rank": (_NUMBER, None),
    "--micro-batch-size": (_NUMBER, None),
    "--global-batch-size": (_NUMBER, None),
    "--cp-comm-type": (_WORDS, None),
    "--num-experts": (_NUMBER, None),
    "--moe-grouped-gemm": (_SWITCH, None),
    "--moe-token-dispatcher-type": (_WORD, "ep_dispatch"),
    "--overlap-grad-reduce": (_SWITCH, "overlap_grad_reduce"),
    "--overlap-param-gather": (_SWITCH, "overlap_param_gather"),
    "--tp-comm-overlap": (_SWITCH, "tp_comm_overlap"),
    "--recompute-activations": (_SWITCH, None),
    "--recompute-granularity": (_WORD, None),
    "--recompute-method": (_WORD, None),
    "--recompute-num-layers": (_NUMBER, None),
    "--bf16": (_SWITCH, None),
    "--fp16": (_SWITCH, None),
    "--accumulate-allreduce-grads-in-fp32": (_SWITCH, None),
    "--grad-reduce-in-bf16": (_SWITCH, None),
}

_Flags = dict[str, Any]
_PlanFields = dict[str, Any]


def plan_fields(args: str | Sequence[str], world_size: int | None = None) -> _PlanFields:
    """The keyword arguments of the `Plan` that Megatron's flags `args` describe.

    args: a command line, or its words; `--flag value` and `--flag=value` both do.
    world_size: number of ranks (a positive int); `dp` is what it leaves after tp, pp and cp. None: `dp` is 1.
    Raises PlanError, naming the flag, for one that is unknown, repeated, lacks its value, or contradicts
    another; whether the fields fit each other is left to `Plan`.
    """
    flags = _read_flags(args)
    fields = {field: flags[flag] for flag, (_, field) in _FLAGS.items() if field and flag in flags}
    if fields.get("tp", 1) > 1:
        fields.setdefault("sequence_parallel", False)
    for derive in _DERIVED:
        fields.update(derive(flags, fields, world_size))
    return fields


def _read_flags(args: str | Sequence[str]) -> _Flags:
    """Flag -> True, a positive int, a word, or a list of words."""
    try:
        # shlex joins no lines: a backslash at a line's end would leave a newline as a word.
        lines = args.replace("\\\n", " ") if isinstance(args, str) else None
        words = [str(word) for word in args] if lines is None else shlex.split(lines)
    except ValueError as error:
        raise PlanError("args", args, f"must be a well-formed command line ({error})") from None
    flags: _Flags = {}
    while words:
        flag, equals, value = words.pop(0).partition("=")
        if not flag.startswith("-"):
            raise PlanError("args", flag, "must begin with a flag, as in --tensor-model-parallel-size")
        values = [value] if equals else []
        while not equals and words and not words[0].startswith("--"):
            values.append(words.pop(0))
        if flag not in _FLAGS:
            close = difflib.get_close_matches(flag, _FLAGS, n=1)
            known = "must be one of the parallelism flags that fxpar knows (listed in fxpar/plan/megatron.py)"
            raise PlanError(flag, " ".join(values) or True, known, close[0] if close else None)
        if flag in flags:
            raise PlanError(flag, flags[flag], "must be given once")
        flags[flag] = _read_values(flag, values)
    return flags


def _read_values(flag: str, values: list[str]) -> Any:
    takes = _FLAGS[flag][0]
    shown = " ".join(values)
    if takes == _SWITCH:
        if values:
            raise PlanError(flag, shown, "takes no value", flag)
        return True
    if not values or (len(values) > 1 and takes != _WORDS):
        raise PlanError(flag, shown, f"takes one {'word' if takes == _WORDS else takes}")
    if takes != _NUMBER:
        return values if takes == _WORDS else shown
    if not (shown.isdecimal() and int(shown) > 0):
        raise PlanError(flag, shown, "must be a positive integer", f"{flag} 1")
    return int(shown)


def _up(number: int, step: int) -> int:
    """The least multiple of `step` that is not below `number`."""
    return -(-number // step) * step


_NEED_DP = ("--expert-model-parallel-size", "--num-distributed-optimizer-instances", "--global-batch-size")


def _data_parallel(flags: _Flags, fields: _PlanFields, world_size: int | None) -> _PlanFields:
    others = fields.get("tp", 1) * fields.get("pp", 1) * fields.get("cp", 1)
    if world_size is None:
        for flag in _NEED_DP:
            if flag in flags:
                raise PlanError("world_size", None, f"must be given with {flag}, which depends on dp")
        return {"dp": 1}
    if isinstance(world_size, bool) or not isinstance(world_size, int) or world_size < 1:
        raise PlanError("world_size", world_size, "must be a positive integer", f"world_size={others}")
    if world_size % others:
        requirement = f"must be a multiple of tp x pp x cp = {others}"
        raise PlanError("world_size", world_size, requirement, f"world_size={_up(world_size, others)}")
    return {"dp": world_size // others}


def _zero(flags: _Flags, fields: _PlanFields, world_size: int | None) -> _PlanFields:
    """The strategy if it is named, else 3 for FSDP; never less than the distributed optimizer's 1."""
    least = int("--use-distributed-optimizer" in flags)
    fsdp = any(flag in flags for flag in ("--use-megatron-fsdp", "--use-custom-fsdp", "--use-torch-fsdp2"))
    flag = "--data-parallel-sharding-strategy"
    if flag not in flags:
        return {"zero": 3 if fsdp else least}
    if flags[flag] not in ZERO_NAMES:
        requirement = f"must be one of {', '.join(ZERO_NAMES)}"
        raise PlanError(flag, flags[flag], requirement, f"{flag} {ZERO_NAMES[least]}")
    return {"zero": max(least, ZERO_NAMES.index(flags[flag]))}


def _stages(flags: _Flags, fields: _PlanFields, world_size: int | None) -> _PlanFields:
    """Virtual stages, as a number a rank or as layers a stage; more than one: the schedule is interleaved."""
    stages = flags.get("--num-virtual-stages-per-pipeline-rank", 1)
    flag = "--num-layers-per-virtual-pipeline-stage"
    if flag in flags:
        layers, per_stage, pp = flags.get("--num-layers"), flags[flag], fields.get("pp", 1)
        if "--num-virtual-stages-per-pipeline-rank" in flags:
            raise PlanError(flag, per_stage, "must not be given with --num-virtual-stages-per-pipeline-rank")
        if layers is None:
            raise PlanError(flag, per_stage, "needs --num-layers", f"--num-layers {per_stage * pp}")
        if layers % (per_stage * pp):
            requirement = f"times pp = {pp} must divide --num-layers = {layers}"
            raise PlanError(flag, per_stage, requirement, None if layers % pp else f"{flag} {layers // pp}")
        stages = layers // (per_stage * pp)
    return {"virtual_stages": stages, "schedule": "interleaved1f1b"} if stages > 1 else {}


def _microbatches(flags: _Flags, fields: _PlanFields, world_size: int | None) -> _PlanFields:
    """How many micro batches (in samples) make one replica's part of the global batch (in samples)."""
    flag, micro = "--global-batch-size", flags.get("--micro-batch-size")
    if flag not in flags:
        return {}
    if micro is None:
        raise PlanError(flag, flags[flag], "needs --micro-batch-size", "--micro-batch-size 1")
    step = micro * fields["dp"]
    if flags[flag] % step:
        requirement = f"must be a multiple of micro batch x dp = {step}"
        raise PlanError(flag, flags[flag], requirement, f"{flag} {_up(flags[flag], step)}")
    return {"microbatches": flags[flag] // step}


def _context(flags: _Flags, fields: _PlanFields, world_size: int | None) -> _PlanFields:
    flag = "--cp-comm-type"
    kinds = flags.get(flag, [])
    if len(set(kinds)) > 1:
        raise PlanError(flag, " ".join(kinds), "must be the same in all layers", f"{flag} {kinds[0]}")
    return {"cp_comm": kinds[0]} if kinds else {}


def _experts(flags: _Flags, fields: _PlanFields, world_size: int | None) -> _PlanFields:
    flag, ep = "--num-experts", fields.get("ep", 1)
    if flags.get(flag, 0) % ep:
        raise PlanError(
            flag, flags[flag], f"must be a multiple of ep = {ep}", f"{flag} {_up(flags[flag], ep)}"
        )
    flag = "--expert-tensor-parallel-size"
    if flags.get(flag, 1) != 1:
        requirement = "must be 1: experts are not split over tp, ep is folded over it"
        raise PlanError(flag, flags[flag], requirement, f"{flag} 1")
    return {}


def _recompute(flags: _Flags, fields: _PlanFields, world_size: int | None) -> _PlanFields:
    default = "selective" if "--recompute-activations" in flags else "none"
    flag = "--recompute-granularity"
    kind = flags.get(flag, default)
    if flag in flags and kind not in ("selective", "full"):
        raise PlanError(flag, kind, "must be selective or full", f"{flag} full")
    flag = "--recompute-method"
    if flags.get(flag, "uniform") != "uniform":
        requirement = "must be uniform: to recompute in part, Plan(recompute=0.5) sets a memory budget"
        raise PlanError(flag, flags[flag], requirement, f"{flag} uniform")
    return {"recompute": kind}


def _dtypes(flags: _Flags, fields: _PlanFields, world_size: int | None) -> _PlanFields:
    """As in Megatron, bf16 reduces gradients in fp32 unless told to do it in bf16."""
    if "--bf16" in flags and "--fp16" in flags:
        raise PlanError("--fp16", True, "must not be given with --bf16", "--bf16")
    flag = "--accumulate-allreduce-grads-in-fp32"
    if flag in flags and "--grad-reduce-in-bf16" in flags:
        raise PlanError(flag, True, "must not be given with --grad-reduce-in-bf16", flag)
    fp32 = "--bf16" in flags or flag in flags
    return {
        "param_dtype": "bfloat16" if "--bf16" in flags else "float16" if "--fp16" in flags else None,
        "reduce_dtype": "bfloat16" if "--grad-reduce-in-bf16" in flags else "float32" if fp32 else None,
    }


# In order: `_microbatches` reads the dp that `_data_parallel` found.
_DERIVED: tuple[Callable[[_Flags, _PlanFields, int | None], _PlanFields], ...] = (
    _data_parallel, _zero, _stages, _microbatches, _context, _experts, _recompute, _dtypes,
)  # fmt: skip

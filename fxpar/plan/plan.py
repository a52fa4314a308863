"""`Plan`: how a model is spread over ranks, as one immutable value.

A plan is checked in three steps, each raising `PlanError`: on its own when it is made, against the number
of ranks by `check_world`, and against what this version can do by `require_supported`. What depends on the
model is checked where the model is known.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeGuard

import torch

from fxpar.errors import PlanError, brief
from fxpar.plan.files import fields_of
from fxpar.plan.megatron import LIMIT, ZERO_NAMES, plan_fields

# Field -> the one value of it that this version can run. Fields that are not here are available in full.
_ONLY_YET: dict[str, object] = {}
"""Fields that can have one value yet, because nothing would read another: none at present."""
AUTO_TP_OVERLAP = False
"""What `tp_comm_overlap` is where nobody says it: it was measured faster, but for one shape alone."""


@dataclass(frozen=True, repr=False)
class Plan:
    """Degrees and options of every parallelism. Frozen, hashable, and equal when all fields are.

    Degrees count ranks; the world size is dp x tp x pp x cp. Each field is described as it is stored; what
    else the constructor takes is in brackets.

    dp, tp, pp, cp: degrees of data, tensor, pipeline and context parallelism.
    ep: degree of expert parallelism, folded over the others: divides dp x cp x tp and multiplies nothing.
    zero: 0 replicate, 1 shard optimizer state, 2 and gradients, 3 and parameters [or Megatron's names].
    dp_replicate: divides dp; ZeRO shards over dp / dp_replicate ranks and replicates across.
    sequence_parallel: shard the residual stream's sequence over tp; None: when tp > 1. Kept as given, so that
        `dataclasses.replace(plan, tp=2)` still decides; read `shards_sequence` for the answer.
    cp_comm: "p2p", "allgather", "a2a" or "a2a+p2p".
    microbatches: how many parts a replica's batch is run in.
    schedule: "gpipe", "1f1b", "interleaved1f1b", "zb1p" or "zbv".
    virtual_stages: parts of the model that one pipeline rank holds: 1 under gpipe and 1f1b, 2 or more under interleaved1f1b, 2
        under zbv, any number under zb1p.
    stage_boundaries: names of the modules that begin a stage, in the order in which they run, for all pp x virtual_stages stages
        but the first [or "name;name"]; (): the cost model cuts.
    ep_dispatch: how tokens reach their experts: "alltoall" sends each to the ranks of its own, "allgather" all to all.
    recompute: "none", "selective", "full", or the memory budget as a fraction in (0, 1].
    param_dtype, reduce_dtype: of compute and of gradient reduction; None: the model's [or a name: "bf16"].
    overlap_grad_reduce, overlap_param_gather: hide that communication behind compute.
    tp_comm_overlap: hide what tensor parallelism gathers and scatters behind the products beside it; None: where it was measured
        faster. Kept as given; read `overlaps_tp` for the answer.
    outputs: "all" (what tp or cp splits comes as DTensors), "whole" (it is gathered: plain tensors on every rank), or "loss" to
        make nothing else.
    batch_dims: pairs (input name, its batch dim, from 0, or None for none), sorted [or a mapping].
    roles: pairs ("param_fqn[dim]", its role or None), sorted [or a mapping]. Both override what is inferred.

    Raises PlanError if a field has a value it cannot have, or two fields contradict each other.
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    zero: int = 0
    dp_replicate: int = 1
    sequence_parallel: bool | None = None
    cp_comm: str = "p2p"
    microbatches: int = 1
    schedule: str = "1f1b"
    virtual_stages: int = 1
    stage_boundaries: Sequence[str] = ()
    ep_dispatch: str = "alltoall"
    recompute: str | float = "none"
    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True
    tp_comm_overlap: bool | None = None
    outputs: str = "all"
    batch_dims: Mapping[str, int | None] | tuple[tuple[str, int | None], ...] = ()
    roles: Mapping[str, str | None] | tuple[tuple[str, str | None], ...] = ()

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))
        _check_together(self)

    @property
    def degrees(self) -> dict[str, int]:
        """The degrees whose product is the world size, by name."""
        return {"dp": self.dp, "tp": self.tp, "pp": self.pp, "cp": self.cp}

    @property
    def world_size(self) -> int:
        """How many ranks the plan takes."""
        return math.prod(self.degrees.values())

    @property
    def shards_sequence(self) -> bool:
        """Whether the residual stream's sequence is sharded over tp: `sequence_parallel`, resolved."""
        return self.tp > 1 and self.sequence_parallel is not False

    @property
    def overlaps_tp(self) -> bool:
        """Whether what tensor parallelism gathers and scatters is hidden behind products: `tp_comm_overlap`, resolved. Only
        where the sequence is sharded does it gather and scatter."""
        return self.shards_sequence and (AUTO_TP_OVERLAP if self.tp_comm_overlap is None else self.tp_comm_overlap)

    @property
    def stores_parts(self) -> bool:
        """Whether parameters, gradients and optimizer state are stored in parts: ZeRO of any level."""
        return self.zero > 0

    @property
    def reduces_each_backward(self) -> bool:
        """Whether every backward of an accumulated step reduces its gradients to parts, so that they are never kept unreduced."""
        return self.zero >= 2

    @property
    def gathers_each_use(self) -> bool:
        """Whether a gathered parameter is dropped after its use and gathered again in the backward, not kept for a step."""
        return self.zero == 3

    @property
    def sends_around(self) -> bool:
        """Whether attention has keys and values go round along the axes of cp that its queries stay split on."""
        return self.cp_comm in ("p2p", "a2a+p2p")

    @property
    def memory_budget(self) -> float | None:
        """The fraction of activations that may be kept, where `recompute` says one."""
        return self.recompute if isinstance(self.recompute, float) else None

    def check_world(self, world_size: int) -> None:
        """Raises PlanError unless the plan takes exactly `world_size` ranks, naming the dp that would."""
        world_size = _positive_int("world_size", world_size)
        if self.world_size == world_size:
            return
        product = f"dp x tp x pp x cp, here {self.world_size}, must equal the world size {world_size}"
        dp, rest = divmod(world_size, self.world_size // self.dp)
        try:
            works = not rest and bool(dataclasses.replace(self, dp=dp))
        except PlanError:  # that dp contradicts ep or dp_replicate
            works = False
        raise PlanError("dp", self.dp, product, f"dp={dp}" if works else f"launching {self.world_size} ranks")

    def require_supported(self) -> None:
        """Raises PlanError if the plan needs something that this version of fxpar cannot run."""
        for name, only in _ONLY_YET.items():
            value = getattr(self, name)
            if value != only:
                raise PlanError(name, value, "not available in this version yet", f"{name}={_show(only)}")

    def __str__(self) -> str:
        """The fields that are not at their default, as `parse` reads them: "dp=2,tp=2"."""
        values = [(field, getattr(self, field.name)) for field in dataclasses.fields(self)]
        shown = [f"{field.name}={_show(value)}" for field, value in values if value != field.default]
        return ",".join(shown) or "dp=1"

    def __repr__(self) -> str:
        return f"Plan.parse({str(self)!r})"

    @classmethod
    def of(cls, plan: Plan | str) -> Plan:
        """A plan, or the plan that a text describes. Raises PlanError for anything else."""
        if isinstance(plan, str):
            return cls.parse(plan)
        if not isinstance(plan, cls):
            raise PlanError("plan", plan, 'must be a fxpar.Plan or its text ("dp=2,tp=2")', "fxpar.Plan()")
        return plan

    @classmethod
    def parse(cls, text: str) -> Plan:
        """The plan written in `text` as `field=value`, separated by commas: "dp=2,tp=2,zero=3".

        Switches are true or false, an absent value is none, overrides are written `name:value;name:value`,
        as in "batch_dims=src:1;tgt:none,roles=head.weight[0]:vocab". `Plan.parse(str(plan)) == plan`, always.
        Raises PlanError for what is not so written, unknown or repeated fields, and as the constructor does.
        """
        if not isinstance(text, str):
            raise PlanError("plan", text, 'must be text ("dp=2,tp=2")', "dp=1")
        given: dict[str, Any] = {}
        for item in text.split(","):
            name, equals, value = (part.strip() for part in item.partition("="))
            if name not in _CHECKS:
                match = difflib.get_close_matches(name, _CHECKS, n=1)
                suggestion = f"{match[0]}={value}" if match and value else "dp=1"
                raise PlanError(name, value, f"must be one of the fields {', '.join(_CHECKS)}", suggestion)
            if not equals:
                default = _show(getattr(cls, name))
                raise PlanError(name, value, f"must be written {name}=value", f"{name}={default}")
            if name in given:
                raise PlanError(name, value, "must be given once", f"{name}={value}")
            given[name] = value if _CHECKS[name] is _names else _read(value)  # a module may be called 0
        return cls(**given)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Plan:
        """The plan in the file `path`: its fields, in TOML, YAML or JSON, by the file's name; or those of its table "plan".

        Values are as the constructor takes them (``recompute = "full"``, ``batch_dims = {src = 1}``). YAML is read with PyYAML,
        which has to be installed. Raises PlanError for what is no such file, unknown fields, and as the constructor does.
        """
        given = fields_of(path)
        for name in given:
            if name not in _CHECKS:
                close = next(iter(difflib.get_close_matches(name, _CHECKS, n=1)), None)
                raise PlanError(name, given[name], f"must be one of the fields {', '.join(_CHECKS)}, in {path}", close)
        return cls(**given)

    @classmethod
    def from_megatron(cls, args: str | Sequence[str], world_size: int | None = None) -> Plan:
        """The plan that Megatron Core's parallelism flags describe, as in "--context-parallel-size 4 --bf16".

        args: a command line, or its words. world_size: number of ranks, from which dp follows; None: dp is 1.
        Raises PlanError naming a flag that is unknown or contradicts another, and as the constructor does.
        """
        return cls(**plan_fields(args, world_size))


# ---- text ----

_TEXT_VALUES: dict[str, bool | None] = {
    "true": True, "on": True, "yes": True, "false": False, "off": False, "no": False, "none": None,
}  # fmt: skip


def _read(text: str) -> object:
    """The value that `text` spells; the text itself if it is nothing simpler."""
    if text.lower() in _TEXT_VALUES:
        return _TEXT_VALUES[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text


def _show(value: object) -> str:
    if isinstance(value, tuple):
        return ";".join(part if isinstance(part, str) else f"{part[0]}:{_show(part[1])}" for part in value)
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value).removeprefix("torch.")


# ---- one field at a time: each check returns the value to store ----


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _positive_int(name: str, value: object) -> int:
    if _is_int(value) and 1 <= value < LIMIT:
        return int(value)
    if _is_int(value) and value >= LIMIT:
        raise PlanError(name, value, f"must be less than {LIMIT}", f"{name}=1")
    meant = int(value) if isinstance(value, float) and value.is_integer() and 1 <= value < LIMIT else 1
    raise PlanError(name, value, "must be a positive integer", f"{name}={meant}")


def _zero_stage(name: str, value: object) -> int:
    if isinstance(value, str) and value.lower() in ZERO_NAMES:
        return ZERO_NAMES.index(value.lower())
    if _is_int(value) and 0 <= value < len(ZERO_NAMES):
        return int(value)
    nearest = f"{min(max(int(value), 0), len(ZERO_NAMES) - 1)}" if _is_int(value) else None
    _refuse_choice(name, value, ("0", "1", "2", "3", *ZERO_NAMES), nearest)


def _switch(name: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise PlanError(name, value, "must be true or false", f"{name}=true")


def _optional_switch(name: str, value: object) -> bool | None:
    return None if value is None else _switch(name, value)


def _one_of(*choices: str) -> Callable[[str, object], str]:
    def check(name: str, value: object) -> str:
        if isinstance(value, str) and value.lower() in choices:
            return value.lower()
        _refuse_choice(name, value, choices)

    return check


def require_one_of(name: str, value: object, choices: Sequence[str]) -> None:
    """Raises PlanError for an argument beside a plan that is none of `choices`, whose first is the default."""
    if value not in choices:
        raise PlanError(name, value, f"must be one of {', '.join(choices)}", choices[0])


def _refuse_choice(name: str, value: object, choices: Sequence[str], nearest: str | None = None) -> NoReturn:
    spelled = (value if isinstance(value, str) else brief(value)).lower()
    match = [nearest] if nearest is not None else difflib.get_close_matches(spelled, choices, n=1) or choices
    raise PlanError(name, value, f"must be one of {', '.join(choices)}", f"{name}={match[0]}")


def _recompute(name: str, value: object) -> str | float:
    kinds = ("none", "selective", "full")
    if value is None:  # how "recompute=none" reads
        return "none"
    if isinstance(value, str) and value.lower() in kinds:
        return value.lower()
    if isinstance(value, numbers.Real) and not isinstance(value, bool) and value <= 1 and not value <= 0:  # no NaN
        return float(value)
    raise PlanError(
        name, value, f"must be one of {', '.join(kinds)}, or a fraction in (0, 1]", f"{name}=full"
    )


_DTYPES = {
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16, "half": torch.float16,
    "float32": torch.float32, "fp32": torch.float32, "float": torch.float32,
    "float64": torch.float64, "fp64": torch.float64, "double": torch.float64,
}  # fmt: skip


def _dtype(name: str, value: object) -> torch.dtype | None:
    spelled = str(value).lower().removeprefix("torch.") if isinstance(value, (str, torch.dtype)) else None
    if value is None or spelled == "none":
        return None
    if spelled in _DTYPES:
        return _DTYPES[spelled]
    _refuse_choice(name, value, tuple(_DTYPES))


# Names hold none of the characters that `Plan.parse` splits at.
_NAME = re.compile(r"[^\s,;:=]+")
_PARAM_DIM = re.compile(r"[^\s,;:=\[\]]+\[(0|[1-9][0-9]*)\]")


def _pairs(name: str, value: object) -> Iterable[tuple[object, object]]:
    """The items of a mapping, of pairs, or of "name:value;name:value" (whose values stay text)."""
    items: Any = value
    if isinstance(value, str):
        items = [item.rpartition(":")[::2] for item in value.split(";") if item.strip()]
        items = [(key.strip(), part.strip()) for key, part in items]
    elif isinstance(value, Mapping):
        items = list(value.items())
    elif value is None:  # how "roles=none" reads
        items = []
    if not isinstance(items, (list, tuple)) or not all(isinstance(i, tuple) and len(i) == 2 for i in items):
        _refuse_pairs(name, value, "must be a mapping, or written name:value;name:value")
    names = [key for key, _ in items]
    if len(set(map(str, names))) < len(names):
        _refuse_pairs(name, value, "must give each name once")
    return items


def _refuse_pairs(name: str, value: object, requirement: str) -> NoReturn:
    example = {"batch_dims": "input_ids:0", "roles": "lm_head.weight[0]:vocab"}[name]
    raise PlanError(name, value, requirement, f"{name}={example}")


def _batch_dims(name: str, value: object) -> tuple[tuple[str, int | None], ...]:
    stored: dict[str, int | None] = {}
    for key, dim in _pairs(name, value):
        dim = _read(dim) if isinstance(dim, str) else dim
        named = isinstance(key, str) and _NAME.fullmatch(key)
        if not named or not (dim is None or (_is_int(dim) and 0 <= dim < LIMIT)):
            _refuse_pairs(
                name, value, "must map an input's name (no spaces or , ; : =) to a dim, from 0, or none"
            )
        stored[str(key)] = None if dim is None else int(dim)
    return tuple(sorted(stored.items()))


def _roles(name: str, value: object) -> tuple[tuple[str, str | None], ...]:
    stored: dict[str, str | None] = {}
    for key, role in _pairs(name, value):
        named = isinstance(key, str) and _PARAM_DIM.fullmatch(key)
        if not named or not (role is None or (isinstance(role, str) and _NAME.fullmatch(role))):
            _refuse_pairs(
                name, value, "must map parameter_name[dim] to a role (no spaces or , ; : =) or none"
            )
        stored[str(key)] = None if role is None or role.lower() == "none" else role
    return tuple(sorted(stored.items()))


def _names(name: str, value: object) -> tuple[str, ...]:
    """The items of a list, or of "name;name"; "none" has none."""
    items: Any = () if value is None or value == "none" else value
    if isinstance(items, str):
        items = [part.strip() for part in items.split(";") if part.strip()]
    requirement = "must be a list of names of modules (no spaces or , ; : =), or written name;name"
    if not isinstance(items, list | tuple) or not all(isinstance(i, str) and _NAME.fullmatch(i) for i in items):
        raise PlanError(name, value, requirement, f"{name}=none")
    if len(set(items)) < len(items) or "none" in items:
        raise PlanError(name, value, "must give each name once, and none is no name", f"{name}=none")
    return tuple(items)


# Every field and its check, in the order of the fields.
_CHECKS: dict[str, Callable[[str, object], object]] = {
    "dp": _positive_int,
    "tp": _positive_int,
    "pp": _positive_int,
    "cp": _positive_int,
    "ep": _positive_int,
    "zero": _zero_stage,
    "dp_replicate": _positive_int,
    "sequence_parallel": _optional_switch,
    "cp_comm": _one_of("p2p", "allgather", "a2a", "a2a+p2p"),
    "microbatches": _positive_int,
    "schedule": _one_of("gpipe", "1f1b", "interleaved1f1b", "zb1p", "zbv"),
    "virtual_stages": _positive_int,
    "stage_boundaries": _names,
    "ep_dispatch": _one_of("alltoall", "allgather"),
    "recompute": _recompute,
    "param_dtype": _dtype,
    "reduce_dtype": _dtype,
    "overlap_grad_reduce": _switch,
    "overlap_param_gather": _switch,
    "tp_comm_overlap": _optional_switch,
    "outputs": _one_of("all", "whole", "loss"),
    "batch_dims": _batch_dims,
    "roles": _roles,
}


# ---- fields against each other ----


def _check_together(plan: Plan) -> None:
    folded = plan.dp * plan.cp * plan.tp
    _check_divides("ep", plan.ep, "dp x cp x tp", folded)
    _check_divides("dp_replicate", plan.dp_replicate, "dp", plan.dp)
    if plan.ep > 1 and plan.tp > 1 and not plan.shards_sequence:
        requirement = (
            f"must be on with ep = {plan.ep} and tp = {plan.tp}, or ranks would dispatch equal tokens"
        )
        raise PlanError("sequence_parallel", plan.sequence_parallel, requirement, "sequence_parallel=true")
    if plan.pp == 1:
        _check_no_pipeline(plan)
    require_virtual_stages(plan.schedule, plan.virtual_stages)
    later = plan.pp * plan.virtual_stages - 1
    if plan.stage_boundaries and len(plan.stage_boundaries) != later:
        requirement = (f"must name the first module of each of the pp x virtual_stages = {later + 1} stages but the first, which "
                       f"are {later}, and names {len(plan.stage_boundaries)}")
        raise PlanError("stage_boundaries", plan.stage_boundaries, requirement, "stage_boundaries=none")


def _check_no_pipeline(plan: Plan) -> None:
    for name, alone in (("schedule", "1f1b"), ("virtual_stages", 1), ("stage_boundaries", ())):
        value = getattr(plan, name)
        if value != alone:
            requirement = "must be left out with pp = 1: it says how a pipeline runs, and there is none"
            raise PlanError(name, value, requirement, f"{name}={_show(alone) or 'none'}, or pp=2")


def require_virtual_stages(schedule: str, virtual_stages: int) -> None:
    """Raises PlanError for a number of stages on each rank that a schedule cannot have."""
    if schedule in ("gpipe", "1f1b") and virtual_stages != 1:
        requirement = f"must be 1 with schedule = {schedule}, whose ranks hold one stage each"
        raise PlanError("virtual_stages", virtual_stages, requirement, "virtual_stages=1, or schedule=interleaved1f1b")
    if schedule == "interleaved1f1b" and virtual_stages < 2:
        requirement = "must be 2 or more with schedule = interleaved1f1b, whose ranks hold several stages"
        raise PlanError("virtual_stages", virtual_stages, requirement, "virtual_stages=2, or schedule=1f1b")
    if schedule == "zbv" and virtual_stages != 2:
        requirement = "must be 2 with schedule = zbv, whose stages go down the ranks and up again"
        raise PlanError("virtual_stages", virtual_stages, requirement, "virtual_stages=2, or schedule=zb1p")


def _check_divides(name: str, value: int, of_what: str, total: int) -> None:
    if total % value:
        largest = min(value, total, 2**16)  # bounds the search; 1 always divides
        near = next(divisor for divisor in range(largest, 0, -1) if total % divisor == 0)
        raise PlanError(name, value, f"must divide {of_what} = {total}", f"{name}={near}")


Plans = list[Plan | str] | list[Plan] | list[str] | tuple[Plan | str, ...]
"""Several plans, or their texts."""

"""What Hugging Face models are asked to do while they are traced: keep no cache, compute attention by operators of ATen, and
experts by products of rows in groups.

Where the cache was, outputs have what says that it was left out (`LeftOut`), so that they are the model's own, key by key.

These are fields of a model's config. They are changed for as long as `as_trained` lasts, in every config that a part of the model
reads, and put back after it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.utils import _pytree as pytree

from fxpar.errors import CaptureError, InputError

_log = logging.getLogger("fxpar")

OF_WHOLE_MODELS = frozenset({
    "generate", "save_pretrained", "push_to_hub", "resize_token_embeddings", "resize_position_embeddings", "load_adapter",
    "save_adapter", "merge_adapter", "unmerge_adapter", "merge_and_unload", "unload", "prune_heads", "init_weights",
})  # fmt: skip
"""Methods that read, write or compute with whole parameters; some of them on one rank, while others would wait."""

TRACED = ("sdpa", "eager")
"""The implementations of attention that are made of ATen's operators."""
GROUPED = "grouped_mm"
"""The implementation of experts of which tokens and experts can lie on different ranks."""


CACHE = "past_key_values"
"""The output that a model has of its cache."""


class LeftOut:
    """In the place of the cache that a forward would have returned, had it not been traced to be trained.

    Raises: `InputError` for whatever is done with it but to look at it, compare it and hand it on.
    """

    def __repr__(self) -> str:
        return f"<{CACHE}, left out of a forward that is trained>"

    def _refuse(self, *_: Any) -> Any:
        raise InputError(f"{CACHE} is left out of what the forward of a parallel module returns, which keeps no cache: generate "
                         "with the plain model, `with module.gathered(): module.generate(...)`")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copies, pickles and inspects it asks for
            raise AttributeError(name)
        return self._refuse()

    __len__ = __iter__ = __getitem__ = __contains__ = _refuse


def with_cache_left_out(model: nn.Module, spec: pytree.TreeSpec) -> tuple[pytree.TreeSpec, int | None]:
    """spec: how the outputs are arranged of a model that was asked for no cache -> how those with a `LeftOut` are, and which leaf
    of them that is; as it was, and None, where the model never returns a cache."""
    made = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    fields = [f.name for f in dataclasses.fields(made)] if dataclasses.is_dataclass(made) else []
    kept = {name: getattr(made, name) for name in fields}
    generates = getattr(model, "can_generate", lambda: False)
    if CACHE not in fields or kept[CACHE] is not None or not generates():
        return spec, None
    flat, spec = pytree.tree_flatten(type(made)(**{**kept, CACHE: LeftOut()}))
    return spec, next(i for i, leaf in enumerate(flat) if isinstance(leaf, LeftOut))


@contextlib.contextmanager
def as_trained(model: nn.Module, arguments: dict[str, Any]) -> Iterator[tuple[dict[str, Any], list[str], bool]]:
    """Inside, `model` (or the Hugging Face models in it) keeps no cache, and its attention and experts can be traced.

    Yields the arguments of the call, with ``use_cache=True`` replaced, notes about what was changed that its user asked for, and
    whether the model itself would have kept a cache. A model that is not Hugging Face's is left alone. Attention and experts that
    the user registered are left alone too.
    Raises: `CaptureError` for a model that was built with an attention that cannot be exchanged.
    """
    transformers: Any = sys.modules.get("transformers")
    parts = [m for m in model.modules() if isinstance(m, transformers.PreTrainedModel)] if transformers else []
    notes: list[str] = []
    undo: list[tuple[Any, str, Any]] = []
    configs = _configs(model, transformers) if parts else []
    own, asked = bool(parts) and parts[0] is model, arguments.get("use_cache")
    cached = own and (any(getattr(c, "use_cache", False) is True for c in configs) if asked is None else bool(asked))
    if own and asked:
        arguments = {**arguments, "use_cache": False}
        notes.append("use_cache=True is left out: a forward that is trained returns no past_key_values")
    if any(getattr(m, "gradient_checkpointing", False) is True for part in parts for m in part.modules()):
        notes.append("the model's own gradient checkpointing is left out: Plan(recompute=...) says what the backward makes again")
    try:
        for config in configs:
            if getattr(config, "use_cache", False) is True:
                undo.append((config, "use_cache", True))
                config.use_cache = False
            asked = config._attn_implementation
            if asked is not None and asked not in TRACED and not _registered_by_user(asked, transformers):
                chosen = _exchanged(config, asked, [p for p in parts if p.config is config])
                undo.append((config, "_attn_implementation_internal", asked))
                config._attn_implementation_internal = chosen  # the public name would change the configs inside of it too
                notes.append(f"attn_implementation={asked!r} cannot be traced: {chosen!r} takes its place, which the backend "
                             "runs by a fused kernel where there is one")
            asked = getattr(config, "_experts_implementation_internal", None)
            if asked not in (None, GROUPED) and _can_group(asked, [p for p in parts if p.config is config]):
                undo.append((config, "_experts_implementation_internal", asked))
                config._experts_implementation_internal = GROUPED
                notes.append(f"experts_implementation={asked!r} keeps experts and tokens together: {GROUPED!r} takes its place")
        yield arguments, list(dict.fromkeys(notes)), cached
    finally:
        for config, name, value in undo:
            setattr(config, name, value)


def say(notes: list[str]) -> None:
    """Log notes, once and not once a rank."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        for note in notes:
            _log.warning(note)


def _configs(model: nn.Module, transformers: Any) -> list[Any]:
    """Every config that a module of the model holds, and those inside of them, once each."""
    kind = transformers.PretrainedConfig
    found: dict[int, Any] = {}
    todo = [c for m in model.modules() for c in vars(m).values() if isinstance(c, kind)]
    while todo:
        config = todo.pop()
        if id(config) not in found:
            found[id(config)] = config
            todo += [c for c in vars(config).values() if isinstance(c, kind)]
    return list(found.values())


def _registered_by_user(name: str, transformers: Any) -> bool:
    known = transformers.AttentionInterface()
    return name in known and not getattr(known[name], "__module__", "").startswith("transformers.")


def _can_group(name: str, parts: list[Any]) -> bool:
    """Whether these models have experts that may be computed in another way than by `name`, which is not the user's own."""
    known = getattr(sys.modules.get("transformers.integrations.moe"), "ALL_EXPERTS_FUNCTIONS", {})
    own = name in known and not getattr(known[name], "__module__", "").startswith("transformers.")
    return not own and any(p._can_set_experts_implementation() for p in parts)


def _exchanged(config: Any, asked: str, parts: list[Any]) -> str:
    """The implementation that computes the same as the one asked for: `sdpa` where it knows all that the model does."""
    fixed = [p for p in parts if not p._can_set_attn_implementation()]
    if fixed:
        raise CaptureError(f"attn_implementation={asked!r} of {type(fixed[0]).__name__}, which was built with it", None,
                           'build the model with attn_implementation="sdpa", or "eager" where it does not know that')
    capped = any("attn" in key and "softcap" in key and value for key, value in vars(config).items())
    return "sdpa" if not capped and all(p._supports_sdpa for p in parts) else "eager"

"""strided: DTensor's placement of a factor that lies inside of a dim, and what DTensor has to be told for it to work."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch.distributed.tensor import DTensor, _dtensor_spec, _redistribute
from torch.distributed.tensor.placement_types import _StridedShard


def strided_shard(dim: int, split_factor: int) -> Any:
    """The DTensor placement of a factor that lies inside a dim, behind `split_factor` others.

    What DTensor and torch.distributed.checkpoint do with such tensors is mended when the first is made.
    """
    _mend_strided_shards()
    return _StridedShard(dim, split_factor=split_factor)


def _says_an_order(placements: Sequence[Any], mesh: Any) -> bool:
    """Whether strided shards are but an order in which plain shards were made: each rank holds consecutive elements."""
    return _dtensor_spec.DTensorSpec._maybe_convert_StridedShard_to_shard_order(tuple(placements), mesh) is not None


def _refuse_strided_chunks() -> None:
    """torch.distributed.checkpoint takes every part of a DTensor for one rectangle: have it refuse parts that are several."""
    for name in ("__create_chunk_list__", "__create_write_items__"):
        original = getattr(DTensor, name)

        def checked(self: Any, *args: Any, original: Callable = original) -> Any:
            if self._local_tensor.shape != self.shape and not _says_an_order(self.placements, self.device_mesh):
                raise NotImplementedError(
                    f"torch.distributed.checkpoint cannot save or load the parts of a tensor of shape {tuple(self.shape)} with "
                    f"placements {self.placements}: each has several pieces; use fxpar.save_checkpoint, fxpar.load_checkpoint")
            return original(self, *args)

        setattr(DTensor, name, functools.wraps(original)(checked))


def _read_strided_shards_left_to_right() -> None:
    """Have DTensor gather strided shards that say no order of shards (heads within a fused weight) one mesh axis after another.

    By itself, torch 2.11 refuses to gather such a tensor, and later versions gather wrongly where one dim has two of them, or
    fail where there is a mesh of both axes. DTensor is told where every spec is made, so that results of operators (optimizer
    states, the values of a state dict) can be gathered as parameters can be.
    """
    spec: Any = _dtensor_spec.DTensorSpec
    step: Any = _redistribute._TransformInfo
    made, kind = spec.__post_init__, step._comm_type_key

    @functools.wraps(made)
    def post_init(self: Any) -> None:
        if self.use_strided_shard_as_shard_order is None and any(isinstance(p, _StridedShard) for p in self.placements):
            self.use_strided_shard_as_shard_order = _says_an_order(self.placements, self.mesh)
        made(self)

    @functools.wraps(kind)
    def alone(self: Any) -> str | None:
        """None: not to be merged with other steps."""
        return None if any(isinstance(p, _StridedShard) for p in self.src_dst_placements) else kind(self)

    spec.__post_init__, step._comm_type_key = post_init, alone


@functools.cache
def _mend_strided_shards() -> None:
    _refuse_strided_chunks()
    _read_strided_shards_left_to_right()

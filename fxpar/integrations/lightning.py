"""Lightning Fabric: a strategy for a module that is parallel already."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

try:
    from lightning.fabric.strategies import DDPStrategy
except ImportError:  # the package of Fabric alone
    from lightning_fabric.strategies import DDPStrategy

from fxpar.checkpoint import load_checkpoint, save_checkpoint
from fxpar.checkpoint.ranks import LocalModel, alike
from fxpar.errors import InputError, PlanError
from fxpar.run.module import ParallelModule

STATE, REST = "fxpar", "rest.pt"
"""What `Fabric.save` writes: a checkpoint of fxpar with model and optimizer, and a file with whatever else it was given."""


class FxparStrategy(DDPStrategy):
    """``Fabric(strategy=FxparStrategy())``: `setup` takes what `fxpar.parallelize` returned, and its optimizer, as they are.

    Data loaders give each *replica* its part: set them up behind the module. Gradients are clipped by their joint norm over all
    ranks. `Fabric.save` writes a folder whose model and optimizer any other plan can load. A loss that the model computes
    is that of all replicas already.
    """

    _module: ParallelModule | None = None

    def setup_module(self, module: nn.Module) -> ParallelModule:
        if not isinstance(module, ParallelModule):
            raise InputError(f"FxparStrategy sets up what fxpar.parallelize returned, and this {type(module).__name__} is a "
                             "plain module: write fabric.setup(fxpar.parallelize(model, plan), optimizer)")
        if self._module not in (None, module):
            raise InputError("this strategy has a parallel module already: use another Fabric for each")
        if self.precision.precision != "32-true":
            raise PlanError("param_dtype", module.plan.param_dtype, "decides in which precision the module computes, and Fabric "
                            f"was told precision={self.precision.precision!r}", "Fabric(precision=None) and "
                            "Plan(param_dtype='bf16', reduce_dtype='fp32')")
        self._module = module
        self._backward_sync_control = _NoSync()
        return module

    def module_to_device(self, module: nn.Module) -> None:
        if isinstance(module, ParallelModule) and module.device.type != self.root_device.type:
            raise InputError(f"the module is on {module.device}, and Fabric works on {self.root_device}: start Fabric with the "
                             "accelerator of that device")
        if not isinstance(module, ParallelModule):
            super().module_to_device(module)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        if self._module is None:
            raise InputError("which replica this rank belongs to is not known yet: call fabric.setup(module, optimizer) before "
                             "fabric.setup_dataloaders")
        return {"num_replicas": self._module.replica.count, "rank": self._module.replica.index}

    def clip_gradients_norm(self, module: Any, optimizer: Optimizer, max_norm: float, norm_type: float = 2.0,
                            error_if_nonfinite: bool = True) -> Tensor:
        norm = module.clip_grad_norm_(max_norm, norm_type)
        if error_if_nonfinite and not torch.isfinite(norm):
            raise RuntimeError(f"the norm of all gradients is {norm.item()}; clip_gradients(error_if_nonfinite=False) goes on")
        return norm

    def all_gather(self, tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        """As Fabric's, of each rank; of an output that lies in parts on a replica's ranks the whole."""
        return super().all_gather(_whole(tensor), *args, **options)

    def all_reduce(self, tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        return super().all_reduce(_whole(tensor), *args, **options)

    # ---- checkpoints ----

    def save_checkpoint(self, path: str | os.PathLike, state: dict[str, Any], storage_options: Any = None,
                        filter: Any = None) -> None:
        if filter or storage_options:
            raise InputError("Fabric.save of a parallel module takes no filter and no storage options")
        module, optimizer, rest = _sorted(state)

        def write() -> None:
            if self.is_global_zero:
                Path(path).mkdir(parents=True, exist_ok=True)
                torch.save({name: x.state_dict() if hasattr(x, "state_dict") else x for name, x in rest.items()},
                           Path(path) / REST)

        alike(LocalModel(module).ranks, path, write)
        save_checkpoint(Path(path) / STATE, module, optimizer)

    def load_checkpoint(self, path: str | os.PathLike, state: Any = None, strict: bool = True,
                        weights_only: bool | None = None) -> dict[str, Any]:
        if not isinstance(state, dict):
            raise InputError("Fabric.load of a parallel module needs a dict with the module, and what else was saved with it")
        module, optimizer, rest = _sorted(state)
        found = torch.load(Path(path) / REST, map_location="cpu", weights_only=weights_only is not False)
        missing = [name for name in rest if name not in found]
        if strict and missing:
            raise KeyError(f"{missing[0]!r} is not in the checkpoint {path}: load without it, or with strict=False")
        load_checkpoint(Path(path) / STATE, module, optimizer)
        for name in [name for name in rest if name in found]:
            value = found.pop(name)
            if hasattr(state[name], "load_state_dict"):
                state[name].load_state_dict(value)
            else:
                state[name] = value
        return found


class _NoSync:
    """Fabric's `no_backward_sync`."""

    def no_backward_sync(self, module: Any, enabled: bool) -> contextlib.AbstractContextManager:
        return module.no_sync() if enabled else contextlib.nullcontext()


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _sorted(state: dict[str, Any]) -> tuple[ParallelModule, Optimizer | None, dict[str, Any]]:
    """The module, its optimizer, and the rest of what is saved."""
    modules = [x for x in state.values() if isinstance(x, nn.Module)]
    optimizers = [x for x in state.values() if isinstance(x, Optimizer)]
    if len(modules) != 1 or not isinstance(modules[0], ParallelModule) or len(optimizers) > 1:
        raise InputError("a checkpoint of FxparStrategy has one parallel module, at most one optimizer, and anything else that "
                         f"has a state_dict or can be pickled; this one would have {len(modules)} modules and "
                         f"{len(optimizers)} optimizers")
    rest = {name: x for name, x in state.items() if not isinstance(x, nn.Module | Optimizer)}
    return modules[0], optimizers[0] if optimizers else None, rest

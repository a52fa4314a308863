"""The tables of models, and what their builders share.

``MODELS`` maps a name to a builder of ``(model, example_inputs)``. Weights are random; nothing is downloaded.
``HELD_OUT`` has the families that were not looked at while the operator rules were written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Any]
Builder = Callable[[], Built]
MODELS: dict[str, Builder] = {}
HELD_OUT: dict[str, Builder] = {}

BATCH, SEQ, VOCAB = 4, 8, 96


def _stand_ins() -> torch.library.Library | None:
    """Where torchvision's compiled operators do not load, let it be imported (timm does). It may lie in the environment's
    folder "vision", apart from the rest."""
    sys.path.append(str(Path(sys.prefix) / "vision"))
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return None
    except RuntimeError:
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        made = torch.library.Library("torchvision", "DEF")
        for op in ("nms", "qnms"):
            made.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return made
    return None


_operators = _stand_ins()  # they exist as long as this does


def _register(table: dict[str, Builder], name: str) -> Callable[[Builder], Builder]:
    return lambda build: table.setdefault(name, build)


model, held_out = partial(_register, MODELS), partial(_register, HELD_OUT)


def build(name: str) -> Built:
    """The model, in training mode, and its inputs: the same at every call."""
    torch.manual_seed(0)
    made, inputs = {**MODELS, **HELD_OUT}[name]()
    return made.train(), inputs


def rows(name: str) -> int:
    """How many rows the inputs of a model have, as a rule `BATCH`."""
    return {"buffers": 2, "mlp_norm": 2 * BATCH, "contrastive": 2 * BATCH}.get(name, BATCH)


def ids(vocab: int = VOCAB, seq: int = SEQ, batch: int = BATCH) -> Tensor:
    return torch.randint(1, vocab, (batch, seq))


def labels(vocab: int = VOCAB, seq: int = SEQ, batch: int = BATCH) -> Tensor:
    """Some tokens are not labelled, and more of them in some rows than in others."""
    made = ids(vocab, seq, batch)
    made[0, : seq // 2] = -100
    made[1, -1] = -100
    return made


def padding(batch: int = BATCH, seq: int = SEQ) -> Tensor:
    """An attention mask of 1 and 0 with rows of different lengths."""
    return (torch.arange(seq) < torch.tensor([seq - i % 3 for i in range(batch)])[:, None]).long()

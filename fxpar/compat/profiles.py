"""profiles: whether PyTorch's profiler listens."""

from __future__ import annotations

import torch.autograd.profiler as profiler


def profiling() -> bool:
    """Whether a profiler (`torch.profiler.profile`, or ``torch.autograd.profiler.emit_nvtx``) records ranges now."""
    return bool(profiler._is_profiler_enabled)

"""What is left of recordings when their module is gone."""

from __future__ import annotations

import gc
import weakref

import torch

from fxpar.run import recording
from tests.recorder import Pretended
from tests.run.test_recording import ModuleLoop


def test_nothing_is_left_of_the_recordings_of_a_module_that_is_collected(monkeypatch):
    """Its gradients lie in the pool, and it is garbage in a cycle, so that weak references to any part of it are dead."""
    monkeypatch.setattr(recording, "WARM", 1)
    monkeypatch.setattr(recording, "TRIED", 1)
    gc.collect()  # what other tests left
    monkeypatch.setattr(recording, "_kept", [])
    device = Pretended()
    loop = ModuleLoop(True, device)
    for _ in range(8):
        loop.loop()
    assert device.remembered == 2 and loop.module._engine.recordings.pool.is_lent()
    module = weakref.ref(loop.module)
    grad = loop.parameters[0].grad.detach()
    value = grad.clone()
    del loop
    gc.collect()
    assert module() is None and not device.remembered
    assert torch.equal(grad, value) and len(recording._kept) == 1, "its memory stays as long as somebody has something of it"
    del grad
    gc.collect()
    ModuleLoop(True, Pretended())
    assert not recording._kept

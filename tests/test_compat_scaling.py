"""compat/scaling.py: what a GradScaler has found."""

from __future__ import annotations

import pytest
import torch

from fxpar import compat


def test_what_was_found_may_be_changed(monkeypatch):
    monkeypatch.setattr(torch.amp.GradScaler, "_unscale_grads_", torch.amp.GradScaler._unscale_grads_)  # restored behind the test
    seen: list[tuple[object, float]] = []

    def note(optimizer: object, found: dict[torch.device, torch.Tensor]) -> None:
        (mine,) = found.values()
        seen.append((optimizer, mine.item()))
        mine.fill_(1.0)

    compat.after_searches_for_inf(note)
    for fused in (False, True):
        p = torch.nn.Parameter(torch.ones(2))
        p.grad = torch.tensor([4.0, 8.0])
        optimizer, scaler = torch.optim.SGD([p], 1.0, fused=fused), torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        scaler.update()
        assert seen.pop() == (optimizer, 0.0) and torch.equal(p, torch.ones(2)) and scaler.get_scale() == pytest.approx(2.0)
    assert not seen

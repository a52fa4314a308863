"""Gradients that are scaled where they are share memory with nothing."""

from __future__ import annotations

import torch

from fxpar.run.own_memory import apart, scale_in_place


def test_gradients_are_scaled_once_each_and_nothing_else_is():
    parameter, both = torch.ones(4), torch.ones(8)
    halves = both[:4], both[4:]
    grads = [parameter, *halves, both[2:6], both[:4], None, torch.ones(1).expand(3), torch.ones(2, 3).t(),
             torch.ones(2, dtype=torch.bfloat16)]
    made = apart(grads, [parameter])
    assert made[1] is halves[0] and made[2] is halves[1] and made[5] is None
    assert all(g is None or g.is_contiguous() for g in made)
    scale_in_place([g for g in made if g is not None], torch.tensor(3.0))
    assert all(g is None or (g == 3).all() for g in made)
    assert (parameter == 1).all() and (both == 3).all()

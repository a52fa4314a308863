"""What programs write to parameters, gradients and outputs between steps: in place, through views, at random."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxpar
from tests.processes import launch


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        logits = self.down(F.gelu(self.up(x)))
        return {"loss": F.cross_entropy(logits, y), "logits": logits}


def _set(t: Tensor, *key: object, value: object) -> None:
    t[key] = value


def _scale_rows(t: Tensor) -> None:
    t[:3] *= 2


def _chunks(t: Tensor) -> None:
    for i, part in enumerate(t.chunk(2)):
        part.mul_(i + 2)


def _largest(t: Tensor) -> None:
    t.mul_(t.abs() >= t.abs().flatten().kthvalue(20).values)


WRITES: dict[str, Callable[[Tensor], object]] = {
    "a row": lambda t: t[0].zero_(), "rows": lambda t: t[:12].zero_(), "rows scaled": _scale_rows,
    "a number in a row": lambda t: _set(t, 1, value=1.0),
    "numbers in columns": lambda t: _set(t, slice(None), slice(2, 4), value=3),
    "a row of another": lambda t: _set(t, 0, value=t[1]),
    "a block of another": lambda t: _set(t, slice(4), slice(2), value=t[4:8, :2]),
    "of a view of a view": lambda t: t[2:10][1:3].t()[0].fill_(7.0), "the diagonal": lambda t: t.diagonal().fill_(1.0),
    "elements of a flat view": lambda t: t.view(-1)[:5].fill_(2.0), "chunks": _chunks,
    "split columns": lambda t: t.split(4, 1)[0].mul_(3), "where a mask is": lambda t: _set(t, t > 0, value=0.0),
    "listed rows": lambda t: _set(t, torch.tensor([0, 2]), value=0.0), "tril_": lambda t: t.tril_(),
    "renorm_": lambda t: t.renorm_(2, 0, 0.5), "index_fill_": lambda t: t.index_fill_(0, torch.tensor([1]), 2.0),
    "the largest": _largest, "eye": nn.init.eye_, "normal": nn.init.normal_, "truncated": nn.init.trunc_normal_,
    "kaiming": nn.init.kaiming_uniform_, "orthogonal": nn.init.orthogonal_, "sparse": lambda t: nn.init.sparse_(t, 0.2),
    "exponential": lambda t: t.exponential_(), "noise": lambda t: t.add_(torch.randn_like(t)),
    "dropped": lambda t: t.copy_(F.dropout(t, 0.5)), "bernoulli": lambda t: t.mul_(torch.bernoulli(torch.full_like(t, 0.5))),
}  # fmt: skip
"""Each is written to a matrix of 16 rows and 8 columns."""


def _compare(rank: int, plan: str) -> list[str]:
    torch.manual_seed(0)
    plain = Net()
    x, y = torch.randn(4, 8), torch.randint(8, (4,))
    model = fxpar.parallelize(copy.deepcopy(plain), plan, {"x": x.chunk(model_dp(plan))[0], "y": y.chunk(model_dp(plan))[0]})
    mine = {"x": x.chunk(model_dp(plan))[model.replica], "y": y.chunk(model_dp(plan))[model.replica]}
    wrong = []
    for number, (name, write) in enumerate(WRITES.items()):
        for net, batch in ((plain, {"x": x, "y": y}), (model, mine)):
            net.zero_grad()
            net(**batch)["loss"].backward()
            torch.manual_seed(number)
            with torch.no_grad():
                write(net.up.weight)
                write(net.up.weight.grad)
                write(net.up.weight.data)
        mine_, own = model.up.weight, plain.up.weight
        for what, have, want in (("weight", mine_, own), ("gradient", mine_.grad, own.grad)):
            if not torch.allclose(have.full_tensor(), want, atol=1e-5, rtol=1e-5):
                wrong.append(f"{what}: {name}")
        model.load_state_dict(plain.state_dict())
    return wrong


def model_dp(plan: str) -> int:
    return fxpar.Plan.parse(plan).dp


@pytest.mark.parametrize("plan", ["tp=2", pytest.param("dp=2,zero=3", marks=pytest.mark.slow),
                                  pytest.param("dp=2", marks=pytest.mark.slow)])
def test_writes_to_parameters_and_gradients_are_those_of_one_device(plan):
    assert launch(2, _compare, plan) == [[], []]


def _outputs(rank: int) -> list[str]:
    torch.manual_seed(0)
    plain, x, y = Net(), torch.randn(4, 8), torch.randint(8, (4,))
    model = fxpar.parallelize(copy.deepcopy(plain), "tp=2", {"x": x, "y": y})
    made = []
    for net in (plain, model):
        torch.manual_seed(1)
        with torch.no_grad():
            logits = net(x, y)["logits"]
            logits[:, 0].zero_()
            logits[:, 3:5] -= 1
            noisy = F.dropout(logits, 0.5) + torch.rand_like(logits)
            drawn = torch.multinomial(logits.softmax(-1), 2)
            kept = logits[:, :6] + torch.arange(6)
        made.append([t.full_tensor() if hasattr(t, "full_tensor") else t for t in (logits, noisy, drawn, kept)])
    return [str(i) for i, (want, have) in enumerate(zip(*made, strict=True)) if not torch.allclose(have, want, atol=1e-6)]


def test_writes_to_outputs_and_samples_of_them_are_those_of_one_device():
    assert launch(2, _outputs) == [[], []]


def _refused(rank: int) -> list[str]:
    x, y = torch.randn(4, 8), torch.randint(8, (4,))
    torch.manual_seed(0)
    model = fxpar.parallelize(Net(), "dp=2", {"x": x, "y": y})
    said = []
    torch.manual_seed(rank)
    for do in (lambda: model.apply(lambda m: nn.init.normal_(m.weight) if isinstance(m, nn.Linear) else None),
               lambda: model.up.bias.detach().apply_(lambda v: v + 1)):
        with pytest.raises(fxpar.FxparError) as error:
            do()
        said.append(str(error.value))
    return said


def test_other_random_numbers_on_each_rank_and_python_functions_are_refused():
    for seeds, applied in launch(2, _refused):
        assert "generator of random numbers" in seeds and "torch.manual_seed" in seeds and "rank 1" in seeds
        assert "gathered(write_back=True)" in applied

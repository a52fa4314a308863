"""Functions of PyTorch that read values in Python are traced as ones that do not."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxpar
from fxpar.passes.capture import written

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A loss of what two layers make of the input."""

    def __init__(self, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.loss, self.mean, self.spread = loss, nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.loss(x[:, :4], self.mean(x), self.spread(x))


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "variances": lambda x, m, s: F.gaussian_nll_loss(m, x, s.exp()),
    "variances below eps": lambda x, m, s: nn.GaussianNLLLoss(full=True, eps=0.5, reduction="sum")(m, x, s.square()),
    "one variance a row": lambda x, m, s: F.gaussian_nll_loss(m, x, s[:, 0].exp(), reduction="none").square().mean(),
    "a number as variance": lambda x, m, s: F.gaussian_nll_loss(m, x, 2.0) + s.square().mean(),
    "cov": lambda x, m, s: torch.cov(m.T).square().sum() + s.T.cov(correction=0).abs().sum() + torch.cov(m[:, 0]),
    "corrcoef": lambda x, m, s: torch.corrcoef(torch.cat([m, s], 1).T).square().sum(),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_losses_that_look_at_values(loss):
    torch.manual_seed(0)
    fxpar.testing.assert_equivalent(Net(loss), ["dp=2", "tp=2", "dp=2,tp=2,zero=3"], (X,))


def test_numbers_are_those_of_pytorch():
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    for t in (x, x[0], x[:1], torch.complex(x, x.flip(1)), torch.arange(6).view(2, 3)):
        torch.testing.assert_close(written.cov(t), torch.cov(t))
        torch.testing.assert_close(written.corrcoef(t), torch.corrcoef(t), equal_nan=True)
    weights = torch.arange(5) + 1
    torch.testing.assert_close(written.cov(x, fweights=weights), torch.cov(x, fweights=weights))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.other = nn.Linear(6, 4), nn.BatchNorm1d(4, momentum=None), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return ((self.other(self.norm(self.layer(x)).tanh()) - x[:, :4]) * torch.arange(4)).tanh().square().mean()


def test_a_batch_norm_without_momentum_keeps_the_mean_of_all_batches():
    torch.manual_seed(0)
    plain = Normed()
    fxpar.testing.assert_equivalent(copy.deepcopy(plain), ["dp=2", "tp=2"], (X,))
    model = fxpar.parallelize(copy.deepcopy(plain), "dp=1", (X,))
    for step in range(3):
        for net in (plain, model):
            net(X + step).backward()
        model(X[:4])
        plain(X[:4])
    for name, want in plain.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), want)


class Spoken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(6, 6, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor, packed: bool) -> Tensor:
        if packed:
            rows = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return nn.utils.rnn.pad_packed_sequence(self.layer(rows)[0], batch_first=True)[0].square().mean()
        made = self.layer(x)[0].log_softmax(-1).transpose(0, 1)
        return F.ctc_loss(made, torch.ones(8, 2, dtype=torch.int64), lengths, torch.full((8,), 2))


@pytest.mark.parametrize("packed, way_out", [(True, "padded rows"), (False, "outside of the model")])
def test_lengths_that_pytorch_reads_are_refused_with_the_way_out(packed, way_out):
    with pytest.raises(fxpar.errors.CaptureError, match=rf"reads the lengths.*test_written.py:\d+ in forward.*{way_out}"):
        fxpar.simulate(Spoken(), "dp=2", (torch.randn(8, 5, 6), torch.full((8,), 5), packed))

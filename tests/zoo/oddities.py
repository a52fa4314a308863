"""Small models with one difficulty each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.registry import BATCH, SEQ, VOCAB, Built, held_out, ids, labels, padding


def oddity(forward: Callable[..., Any], *inputs: Any, **modules: Any) -> Built:
    """A model of these modules (parameters, buffers) with this forward, which takes the model first."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in modules.items():
                if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                    self.register_buffer(name, value)
                else:
                    setattr(self, name, value)

    Odd.forward = forward
    return Odd(), inputs


@held_out("shared_block")
def shared_block() -> Built:
    """One block twice, one table as embedding, as head and transposed."""

    def forward(self, x, target):
        h = self.embed(x)
        for _ in range(2):
            h = h + self.down(F.silu(self.up(h)))
        h = h + (h @ self.embed.weight.T).softmax(-1) @ self.embed.weight
        return F.cross_entropy(F.linear(h, self.embed.weight).flatten(0, 1), target.flatten())

    return oddity(forward, ids(), labels(), embed=nn.Embedding(VOCAB, 32), up=nn.Linear(32, 64), down=nn.Linear(64, 32))


@held_out("buffers")
def buffers() -> Built:
    """A counter, a running mean over the batch, and a codebook, all written in forward."""

    def forward(self, x):
        self.steps += 1
        self.average.mul_(0.9).add_(0.1 * x.detach().mean(0))
        self.book[:2] = x.detach()[:2] * 2
        return self.down(torch.relu(self.up(x - self.average))) * self.steps

    return oddity(
        forward,
        torch.randn(BATCH, 16),
        up=nn.Linear(16, 32),
        down=nn.Linear(32, 16),
        steps=torch.zeros((), dtype=torch.long),
        average=torch.zeros(16),
        book=torch.ones(8, 16),
    )


@held_out("outputs")
def outputs() -> Built:
    """A dict with a tuple, None, numbers, integers and booleans; an input that is returned."""

    def forward(self, x, target, weight=None):
        logits = self.head(torch.relu(self.body(x)))
        return {
            "logits": logits,
            "parts": (logits.argmax(-1), logits > 0, None),
            "count": target.ne(0).sum(),
            "n": 3,
            "same": x,
            "top": logits.topk(2),
            "loss": F.cross_entropy(logits, target),
        }

    return oddity(
        forward, torch.randn(BATCH, 16), torch.randint(8, (BATCH,)), body=nn.Linear(16, 32), head=nn.Linear(32, 8)
    )


@held_out("graph")
def graph() -> Built:
    """Message passing: gather by edge, scatter-add to node."""

    def forward(self, nodes, edges):
        h = self.embed(nodes)
        for _ in range(2):
            message = torch.relu(self.message(torch.cat([h[edges[0]], h[edges[1]]], -1)))
            h = h + self.update(torch.zeros_like(h).index_add_(0, edges[1], message))
            h = h.scatter_add(0, edges[0][:, None].expand_as(message), message)
        return h.mean(0)

    return oddity(
        forward,
        torch.randn(8, 6),
        torch.randint(8, (2, 20)),
        embed=nn.Linear(6, 32),
        message=nn.Linear(64, 32),
        update=nn.Linear(32, 32),
    )


@held_out("size_one")
def size_one() -> Built:
    """One head, one key, one class."""

    def forward(self, x, y):
        q, k, v = self.q(x).unsqueeze(1), self.k(y).unsqueeze(1), self.v(y).unsqueeze(1)
        h = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return F.binary_cross_entropy_with_logits(self.head(h).squeeze(-1), (x[..., 0] > 0).float())

    return oddity(
        forward,
        torch.randn(BATCH, SEQ, 8),
        torch.randn(BATCH, 1, 8),
        q=nn.Linear(8, 8),
        k=nn.Linear(8, 8),
        v=nn.Linear(8, 8),
        head=nn.Linear(8, 1),
    )


@held_out("dropouts")
def dropouts() -> Built:
    made = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Dropout2d(0.3),
        nn.SELU(inplace=True),
        nn.AlphaDropout(0.2),
        nn.Flatten(),
        nn.Linear(128, 32),
        nn.FeatureAlphaDropout(0.2),
        nn.Linear(32, 4),
    )
    return made, (torch.randn(BATCH, 3, 4, 4),)


@held_out("dropouts_in_place")
def dropouts_in_place() -> Built:
    made = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Dropout2d(0.3, inplace=True),
        nn.Flatten(),
        nn.Linear(128, 32),
        nn.Dropout(0.2, inplace=True),
        nn.Linear(32, 4),
        nn.AlphaDropout(0.2, inplace=True),
    )
    return made, (torch.randn(BATCH, 3, 4, 4),)


@held_out("dense_experts")
def dense_experts() -> Built:
    """Every token to every expert, by einsum; the auxiliary loss is a product of means."""

    def forward(self, x):
        gate = self.router(x).softmax(-1)
        h = F.gelu(torch.einsum("bsd,edf->besf", x, self.up))
        y = torch.einsum("besf,efd,bse->bsd", h, self.down, gate)
        used = F.one_hot(gate.argmax(-1), 4).float().mean((0, 1))
        return y.square().mean() + (used * gate.mean((0, 1))).sum() + gate.logsumexp(-1).square().mean()

    return oddity(
        forward,
        torch.randn(BATCH, SEQ, 16),
        router=nn.Linear(16, 4),
        up=nn.Parameter(torch.randn(4, 16, 32) / 4),
        down=nn.Parameter(torch.randn(4, 32, 16) / 6),
    )


@held_out("lora")
def lora() -> Built:
    """Frozen weights beside ones that are trained, and an input that wants a gradient."""

    def forward(self, x):
        h = torch.relu(self.up(x) + F.linear(F.linear(x, self.a), self.b))
        return self.down(h).square().mean()

    up, down = nn.Linear(16, 64).requires_grad_(False), nn.Linear(64, 16).requires_grad_(False)
    return oddity(
        forward,
        torch.randn(BATCH, SEQ, 16, requires_grad=True),
        up=up,
        down=down,
        a=nn.Parameter(torch.randn(4, 16)),
        b=nn.Parameter(torch.randn(64, 4)),
    )


@held_out("contrastive")
def contrastive() -> Built:
    """Every row of the batch against every other, and labels made in forward."""

    def forward(self, x, y):
        a, b = F.normalize(self.left(x), dim=-1), F.normalize(self.right(y), dim=-1)
        similar = a @ b.T * self.scale.exp()
        target = torch.arange(len(x))
        return (F.cross_entropy(similar, target) + F.cross_entropy(similar.T, target)) / 2

    return oddity(
        forward,
        torch.randn(8, 16),
        torch.randn(8, 12),
        left=nn.Linear(16, 32),
        right=nn.Linear(12, 32),
        scale=nn.Parameter(torch.tensor(1.0)),
    )


@held_out("convolutions")
def convolutions() -> Built:
    """Audio-like: grouped and depthwise convolutions, group norm, GLU, padding, resampling, weight norm."""

    def forward(self, x):
        h = self.grouped(F.glu(self.first(F.pad(x, (2, 0))), dim=1))
        h = self.norm(self.depthwise(h)) + h
        h = F.interpolate(F.avg_pool1d(h, 2), scale_factor=2.0)
        return self.last(F.leaky_relu(h))

    last = nn.utils.parametrizations.weight_norm(nn.Conv1d(16, 2, 1))
    return oddity(
        forward,
        torch.randn(BATCH, 4, 16),
        first=nn.Conv1d(4, 32, 3),
        last=last,
        norm=nn.GroupNorm(4, 16),
        grouped=nn.Conv1d(16, 16, 3, padding=1, groups=4),
        depthwise=nn.Conv1d(16, 16, 3, padding=1, groups=16),
    )


@held_out("linear_attention")
def linear_attention() -> Built:
    """Kernel attention by cumulative sums: the sequence cannot be split, heads can."""

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 8).unbind(2)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        state = torch.einsum("bshd,bshe->bshde", k, v).cumsum(1)
        weight = torch.einsum("bshd,bshd->bsh", q, k.cumsum(1))
        y = torch.einsum("bshd,bshde->bshe", q, state) / weight.unsqueeze(-1)
        return self.out(y.flatten(2)).square().mean()

    return oddity(forward, torch.randn(BATCH, SEQ, 32), qkv=nn.Linear(32, 96), out=nn.Linear(32, 32))


@held_out("fused_mlp")
def fused_mlp() -> Built:
    """Gate and up in one weight, interleaved; a mask that is averaged over."""

    def forward(self, x, mask):
        gate, up = self.both(x)[..., ::2], self.both(x)[..., 1::2]
        y = self.down(F.silu(gate) * up) + self.second(torch.cat([x, x.flip(1)], -1)).chunk(2, -1)[0]
        return (y * mask[..., None]).sum() / mask.sum()

    return oddity(
        forward,
        torch.randn(BATCH, SEQ, 16),
        padding().float(),
        both=nn.Linear(16, 64),
        down=nn.Linear(32, 16),
        second=nn.Linear(32, 32),
    )

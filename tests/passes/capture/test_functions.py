"""Custom `torch.autograd.Function`s: the backward that their authors wrote, under plans."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxpar
from fxpar.errors import CaptureError
from fxpar.testing import assert_equivalent

PLANS = ["dp=2", "dp=2,zero=3", "tp=2", "dp=2,tp=2,zero=1"]


class Reverse(torch.autograd.Function):
    """Gradient reversal, in a layer where it is not the identity."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -ctx.scale * g, None


class Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, g):
        return g.neg() / 3


class Round(torch.autograd.Function):
    """A straight-through estimator with a learnt step, whose gradient is a sum (LSQ)."""

    @staticmethod
    def forward(ctx, x, step):
        ctx.save_for_backward(x, step)
        return (x / step).round().clamp(-4, 4) * step

    @staticmethod
    def backward(ctx, g):
        x, step = ctx.saved_tensors
        q = x / step
        inside = (q >= -4) & (q <= 4)
        of_step = torch.where(inside, q.round() - q, q.clamp(-4, 4))
        return torch.where(inside, g, 0.0), (g * of_step).sum().reshape(step.shape) * 0.1


class Gelu(torch.autograd.Function):
    """An activation with a backward of its own, which recomputes; without `ctx` in its forward."""

    @staticmethod
    def forward(x):
        return x * torch.sigmoid(1.702 * x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(1.702 * x)
        out = g.clone()
        out *= s + 1.702 * x * s * (1 - s)
        return out


class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return x @ weight.t() + bias

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = g @ weight
        if ctx.needs_input_grad[1]:
            of_weight = g.reshape(-1, g.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
        return of_x, of_weight, g.flatten(0, -2).sum(0)


class TopOne(torch.autograd.Function):
    """A router's choice, straight through to the chosen probability; the index has no gradient."""

    @staticmethod
    def forward(ctx, p):
        index = p.argmax(-1, keepdim=True)
        ctx.save_for_backward(index)
        ctx.mark_non_differentiable(index)
        ctx.width = p.shape[-1]
        return torch.ones_like(p.gather(-1, index)), index

    @staticmethod
    def backward(ctx, g, _):
        (index,) = ctx.saved_tensors
        made = g.new_zeros(*g.shape[:-1], ctx.width)
        made.scatter_add_(-1, index, g)
        return made


class Both(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a * b, a + b

    @staticmethod
    def backward(ctx, g, h):
        a, b = ctx.saved_tensors
        return 2 * (g * b + h), g * a + h


class Auxiliary(torch.autograd.Function):
    """A loss attached to an activation: its gradient is the same, whatever arrives."""

    @staticmethod
    def forward(ctx, x, loss):
        ctx.save_for_backward(loss)
        return x

    @staticmethod
    def backward(ctx, g):
        (loss,) = ctx.saved_tensors
        return g, torch.ones_like(loss) * 0.3


class CrossEntropy(torch.autograd.Function):
    """A loss that makes its gradient in the forward."""

    @staticmethod
    def forward(ctx, x, labels):
        p = x.softmax(-1)
        ctx.save_for_backward((p - F.one_hot(labels, x.shape[-1])) / labels.numel())
        return -p.gather(-1, labels.unsqueeze(-1)).log().mean()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0] * 0.5, None


class Decay(torch.autograd.Function):
    """A gradient with a part that depends on what arrives, and one that does not."""

    @staticmethod
    def forward(ctx, w):
        ctx.save_for_backward(w)
        return w.clone()

    @staticmethod
    def backward(ctx, g):
        return g + 0.01 * ctx.saved_tensors[0]


class Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g.clamp(-0.1, 0.1)


class SignOf(Clip):
    @staticmethod
    def backward(ctx, g):
        return g.sign()


class Normalised(Clip):
    @staticmethod
    def backward(ctx, g):
        return g / g.norm()


class Recomputed(torch.autograd.Function):
    """A checkpoint of its author's."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, g):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = x.tanh()
        torch.autograd.backward(y, g)
        return x.grad


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, g):
        return g * 2


class Net(nn.Module):
    """Blocks of two layers around what is tried, as tp splits them."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.table = nn.Embedding(32, 8)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 32)
        self.step = nn.Parameter(torch.tensor([0.11]))

    def forward(self, ids, labels):
        x = self.table(ids)
        h = self.up(x)
        h, extra = getattr(self, self.kind)(x, h)
        logits = self.head(x + self.down(h))
        if self.kind == "loss":
            return CrossEntropy.apply(logits, labels)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()) + extra

    def reverse(self, x, h):
        return Reverse.apply(h, 0.5), 0

    def same(self, x, h):
        return Same.apply(h), 0

    def rounded(self, x, h):
        return Round.apply(h, self.step), 0

    def gelu(self, x, h):
        return Gelu.apply(h), 0

    def linear(self, x, h):
        return Linear.apply(x, self.up.weight, self.up.bias), 0

    def weights(self, x, h):
        return F.linear(x, Round.apply(self.up.weight, self.step), self.up.bias), 0

    def router(self, x, h):
        gate, index = TopOne.apply(h.softmax(-1))
        return h * gate + index, 0

    def both(self, x, h):
        product, total = Both.apply(h, h.tanh())
        return product + total.relu(), product.mean()

    def half(self, x, h):
        product, _ = Both.apply(h, h.tanh())
        return product, 0

    def auxiliary(self, x, h):
        return Auxiliary.apply(h, (h.softmax(-1).mean((0, 1)) ** 2).sum()), 0

    def decay(self, x, h):
        return F.linear(x, Decay.apply(self.up.weight)), 0

    def frozen(self, x, h):
        with torch.no_grad():
            shift = Reverse.apply(h, 0.5)
        return h + shift, 0

    def loss(self, x, h):
        return h, 0

    def nested(self, x, h):
        return Reverse.apply(Round.apply(Gelu.apply(h), self.step), 2.0), 0

    def clip(self, x, h):
        return Clip.apply(h), 0

    def sign(self, x, h):
        return SignOf.apply(h), 0

    def normalised(self, x, h):
        return Normalised.apply(h), 0

    def recomputed(self, x, h):
        return Recomputed.apply(h), 0

    def in_place(self, x, h):
        return InPlace.apply(h), 0


KINDS = ["reverse", "same", "rounded", "gelu", "linear", "weights", "router", "both", "half", "auxiliary", "decay", "frozen",
         "loss", "nested"]  # fmt: skip


def batch():
    torch.manual_seed(1)
    return {"ids": torch.randint(0, 32, (4, 6)), "labels": torch.randint(0, 32, (4, 6))}


def net(kind):
    torch.manual_seed(0)
    return Net(kind)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_backward_is_the_authors(kind, plan):
    assert_equivalent(net(kind), plan, batch())


FAST = ("reverse", "auxiliary", "weights")


@pytest.mark.parametrize("kind", [k if k in FAST else pytest.param(k, marks=pytest.mark.slow) for k in KINDS])
def test_the_backward_is_the_authors_in_lowered_graphs(kind):
    assert_equivalent(net(kind), "dp=2,tp=2,zero=3", batch(), lowered=True)


def test_a_backward_inside_of_a_backward_is_refused_by_line():
    with pytest.raises(CaptureError, match=r"torch.autograd.backward inside .* in backward\)"):
        fxpar.simulate(net("recomputed"), "dp=2", batch())


@pytest.mark.parametrize("kind, says", [("clip", "Clip"), ("sign", "SignOf"), ("normalised", "Normalised"),
                                        ("in_place", "InPlace")])  # fmt: skip
def test_what_is_not_linear_is_refused_by_name_and_line(kind, says):
    with pytest.raises(CaptureError) as error:
        fxpar.simulate(net(kind), "dp=2", batch())
    assert says in error.value.what and f"in {kind}" in error.value.where and "test_functions.py" in error.value.where
    assert error.value.way_out

"""Rules of convolutions, pooling and resampling: batch and channels are parallel, space stays replicated."""

from __future__ import annotations

import torch

from fxpar.passes.infer.rules.registry import rule
from fxpar.passes.infer.rules.spec import Op, Operand, Spec
from fxpar.sharding.factors import Dim, extent

aten = torch.ops.aten


@rule(aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution.default, aten.conv_transpose1d.default,
      aten.conv_transpose2d.input, aten.conv_transpose3d.input)  # fmt: skip
def convolution(op: Op) -> Spec:
    """``n (g i) *, (g o) i *k, +(g o) -> n (g o) *``: groups, in- and out-channels may be split."""
    x, weight, bias = op["input"], op["weight"], op["bias"]
    groups = op["groups"] or 1
    transposed = "transpose" in str(op.target) or bool(op["transposed"])
    own, kernel = op.dims(x), op.dims(weight)
    batched = len(own) == len(kernel)
    channels = own[1] if batched else own[0]
    rows, columns = (kernel[1], kernel[0]) if transposed else (kernel[0], kernel[1])
    replicated = {f for d in (*own[2 if batched else 1 :], *kernel[2:]) for f in d}
    group = op.factors.new(groups)
    if transposed and groups > 1:
        replicated.update((*channels, *rows, *columns))
        out: Dim = op.factors.new(int(op.out.shape[1 if batched else 0]))
        replicated.update(out)
        inner: Dim = ()
    else:
        inner = columns
        out = rows
        if not op.factors.align(channels, (*group, *columns)):
            replicated.update(channels, columns, rows)
        if groups > 1 and not op.factors.align(rows, (*group, *op.factors.new(max(extent(rows) // groups, 1)))):
            replicated.update(channels, columns, rows)
    space = op.factors.fresh(op.out.shape[2 if batched else 1 :])
    replicated.update(f for d in space for f in d)
    operands = [Operand(x, own), Operand(weight, kernel)]
    if bias is not None:
        if not op.factors.align(op.dim(bias, 0), out):
            replicated.update(out, op.dim(bias, 0))
        operands.append(Operand(bias, op.dims(bias), deferred=True, along=-1 - len(space)))
    spec = Spec(operands, [(*own[:1], out, *space) if batched else (out, *space)], sums=set(inner), replicated=replicated)
    if groups > 1:
        spec.emit = lambda local: local.default(groups=groups // local.ranks(group))
    return spec


POOLS = (aten.max_pool1d, aten.max_pool2d, aten.max_pool3d, aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d,
         aten.adaptive_avg_pool1d, aten.adaptive_avg_pool2d, aten.adaptive_avg_pool3d, aten._adaptive_avg_pool2d,
         aten.adaptive_max_pool1d, aten.adaptive_max_pool2d, aten.max_pool2d_with_indices, aten.max_pool1d_with_indices,
         aten.max_pool3d_with_indices, aten._adaptive_avg_pool3d)  # fmt: skip
RESAMPLERS = (aten.upsample_nearest1d, aten.upsample_nearest2d, aten.upsample_nearest3d, aten.upsample_bilinear2d,
              aten.upsample_bicubic2d, aten.upsample_trilinear3d, aten.upsample_linear1d, aten._upsample_bilinear2d_aa,
              aten._upsample_bicubic2d_aa, aten._upsample_nearest_exact2d, aten._upsample_nearest_exact1d)  # fmt: skip
SPACE = {"1d": 1, "2d": 2, "3d": 3}


@rule(*POOLS, *RESAMPLERS)
def pool(op: Op) -> Spec:
    x = op.tensors()[0]
    own = op.dims(x)
    spatial = next(n for k, n in SPACE.items() if k in str(op.target))
    lead = len(own) - spatial
    space = op.factors.fresh(op.outs()[0].shape[lead:])
    replicated = {f for d in (*own[lead:], *space) for f in d}
    return Spec(op.operands(), [(*own[:lead], *space) for _ in op.outs()], replicated=replicated)


@rule(aten.pixel_shuffle.default, aten.pixel_unshuffle.default, aten.channel_shuffle.default)
def shuffle(op: Op) -> Spec:
    (x,) = op.tensors()
    own = op.dims(x)
    made = op.factors.fresh(op.out.shape[-3:])
    replicated = {f for d in (*own[-3:], *made) for f in d}
    return Spec(op.operands(), [(*own[:-3], *made)], replicated=replicated)

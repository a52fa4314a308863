"""Random arguments for convolution, pooling, resampling, recurrence and grouped products."""

from __future__ import annotations

import torch

from fxpar.ops.grouped_mm import grouped_mm
from tests.harness import Gen
from tests.passes.infer.cases.registry import case

aten = torch.ops.aten


def _convolution(g: Gen, spatial: int, transposed: bool = False):
    groups = g.pick(1, 1, 2, 3, 4)
    into, out = g.pick(1, 2, 4), g.pick(1, 2, 3, 4)
    lead = [g.pick(1, 2, 4)] if g.maybe(0.85) else []
    space = [g.pick(4, 5, 6) for _ in range(spatial)]
    kernel = [g.pick(1, 2, 3) for _ in range(spatial)]
    x = g.f(*lead, groups * into, *space)
    weight = g.f(groups * into, out, *kernel) if transposed else g.f(groups * out, into, *kernel)
    return x, weight, g.f(groups * out) if g.maybe() else None, groups


for spatial, target in ((1, aten.conv1d.default), (2, aten.conv2d.default), (3, aten.conv3d.default)):
    case(target, n=spatial)(
        lambda g, n: (lambda x, w, b, groups: (x, w, b, [g.pick(1, 2)] * n, [g.pick(0, 1)] * n, [1] * n, groups))(
            *_convolution(g, n)
        )
    )
for spatial, target in ((1, aten.conv1d.padding), (2, aten.conv2d.padding), (3, aten.conv3d.padding)):
    case(target, n=spatial)(
        lambda g, n: (lambda x, w, b, groups: (x, w, b, [1] * n, g.pick("same", "valid"), [1] * n, groups))(
            *_convolution(g, n)
        )
    )
for spatial, target in (
    (1, aten.conv_transpose1d.default),
    (2, aten.conv_transpose2d.input),
    (3, aten.conv_transpose3d.input),
):
    case(target, n=spatial)(
        lambda g, n: (lambda x, w, b, groups: (x, w, b, [g.pick(1, 2)] * n, [0] * n, [0] * n, groups, [1] * n))(
            *_convolution(g, n, True)
        )
    )


@case(aten.convolution.default)
def convolution(g: Gen):
    n, transposed = g.pick(1, 2), g.maybe(0.3)
    x, w, b, groups = _convolution(g, n, transposed)
    if x.dim() == n + 1:
        x = x.unsqueeze(0).contiguous()
    return x, w, b, [1] * n, [0] * n, [1] * n, transposed, [0] * n, groups


def _space(g: Gen, spatial: int, batched: bool = False):
    lead = g.shape(2, 2) if batched or g.maybe(0.7) else g.shape(1, 1)
    return g.f(*lead, *[g.pick(4, 6) for _ in range(spatial)])


for spatial, names in {
    1: ("max_pool1d", "avg_pool1d", "max_pool1d_with_indices"),
    2: ("max_pool2d", "avg_pool2d", "max_pool2d_with_indices"),
    3: ("max_pool3d", "avg_pool3d", "max_pool3d_with_indices"),
}.items():
    for name in names:
        case(getattr(aten, name).default, n=spatial)(
            lambda g, n: (_space(g, n), [g.pick(1, 2, 3)] * n, [g.pick(1, 2)] * n)
        )
for spatial, names in {
    1: ("adaptive_avg_pool1d",),
    2: ("adaptive_avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d"),
    3: ("adaptive_avg_pool3d", "_adaptive_avg_pool3d"),
}.items():
    for name in names:
        case(getattr(aten, name).default, n=spatial)(lambda g, n: (_space(g, n), [g.pick(1, 2, 3)] * n))
case(aten.adaptive_max_pool1d.default)(lambda g: (_space(g, 1), [g.pick(1, 2, 3)]))

for name, spatial in {
    "upsample_nearest1d": 1,
    "upsample_nearest2d": 2,
    "upsample_nearest3d": 3,
    "_upsample_nearest_exact1d": 1,
    "_upsample_nearest_exact2d": 2,
}.items():
    case(getattr(aten, name).default, n=spatial)(lambda g, n: (_space(g, n, True), [g.pick(3, 8)] * n))
    case(getattr(aten, name).vec, n=spatial)(lambda g, n: (_space(g, n, True), None, [2.0] * n))
for name, spatial in {
    "upsample_bilinear2d": 2,
    "upsample_bicubic2d": 2,
    "upsample_trilinear3d": 3,
    "upsample_linear1d": 1,
    "_upsample_bilinear2d_aa": 2,
    "_upsample_bicubic2d_aa": 2,
}.items():
    case(getattr(aten, name).default, n=spatial)(lambda g, n: (_space(g, n, True), [g.pick(3, 8)] * n, g.maybe()))
    case(getattr(aten, name).vec, n=spatial)(lambda g, n: (_space(g, n, True), None, g.maybe(), [2.0] * n))

case(aten.pixel_shuffle.default)(lambda g: (g.f(*g.shape(0, 2), 4 * g.pick(1, 2), g.n(), g.pick(1, 2)), 2))
case(aten.pixel_unshuffle.default)(lambda g: (g.f(*g.shape(0, 2), g.n(), 4, 2 * g.pick(1, 2)), 2))
case(aten.channel_shuffle.default)(lambda g: (g.f(g.n(), 2 * g.pick(1, 2, 3), *g.shape(1, 2)), 2))


def _recurrent(g: Gen, gates: int, states: int):
    into, hidden, layers, first = g.pick(2, 3), g.pick(2, 4), g.pick(1, 2), g.maybe()
    both, bias = g.maybe(), g.maybe()
    batch, length, ways = g.pick(1, 2, 4, 6), g.pick(1, 3), 2 if both else 1
    x = g.f(*((batch, length) if first else (length, batch)), into)
    weights = []
    for layer in range(layers):
        for _ in range(ways):
            weights += [
                g.f(gates * hidden, into if layer == 0 else ways * hidden),
                g.f(gates * hidden, hidden),
            ]
            weights += [g.f(gates * hidden), g.f(gates * hidden)] if bias else []
    start = [g.f(layers * ways, batch, hidden) for _ in range(states)]
    return x, start if states == 2 else start[0], weights, bias, layers, 0.0, True, both, first


@case(aten._grouped_mm.default, all_rows=True, dtype=torch.float32)
@case(grouped_mm, all_rows=False, dtype=None)
def grouped_product(g: Gen, all_rows: bool, dtype: torch.dtype | None):
    """Groups may be empty. PyTorch's own operator says nothing about rows that are in none."""
    groups, rows = g.pick(2, 3, 4), g.pick(4, 6, 8)
    ends = sorted(g.r.randint(0, rows) for _ in range(groups))
    offsets = torch.tensor([*ends[:-1], rows if all_rows else ends[-1]], dtype=torch.int32)
    return g.f(rows, 32, dtype=dtype), g.f(groups, 32, g.pick(32, 64), dtype=dtype), offsets


case(aten.lstm.input)(lambda g: _recurrent(g, 4, 2))
case(aten.gru.input)(lambda g: _recurrent(g, 3, 1))
case(aten.rnn_tanh.input, aten.rnn_relu.input)(lambda g: _recurrent(g, 1, 1))

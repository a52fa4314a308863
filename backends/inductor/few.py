"""few: a program with many equal blocks compiled in the time that few of them take.

`whole` gives its graphs, of which few blocks were traced; here code is generated for them, and put behind a function of our own
for autograd: that of AOTAutograd knows of the few.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from fxpar import compat
from fxpar.backends.differentiable import differentiable
from fxpar.backends.inductor.brief import Input
from fxpar.backends.inductor.whole import Whole, from_few_blocks
from fxpar.backends.like import Like
from fxpar.plan import Plan
from fxpar.progress import stage

ALIGNED = 16
"""In bytes: where a tensor in the middle of others has to begin for code to be the same as for one by itself."""
Generate = Callable[..., tuple[compat.Code, list[Any]]]
"""As `fxpar.compat.pieces.compile_final`, but for what cuts graphs, which it has."""


@dataclass
class MadeFromFew:
    """Code of a whole program.

    outputs, seeds, donated: see `Whole`. like: the gradients that the backward takes.
    """

    forward: compat.Code
    backward: compat.Code | None
    outputs: int
    seeds: list[int]
    donated: list[int]
    like: list[Like]

    def function(self, recorder: compat.CodeRecorder | None) -> Callable[..., Any]:
        """What runs it on flat inputs, with autograd. recorder: is put around the code."""
        if self.backward is None:
            forward = self.forward if recorder is None else recorder.alone(self.forward)

            def alone(*inputs: Tensor) -> Any:
                with compat.as_traced():
                    return forward([*inputs])

            return alone
        if recorder is None:
            return differentiable(self.forward, self.backward, self.outputs, self.seeds, self.like, self.donated)
        return differentiable(recorder.forward(self.forward, self.outputs), recorder.backward(self.backward), self.outputs,
                              self.seeds, self.like, self.donated)


def made_from_few(plain: fx.GraphModule, given: list[Tensor], config: dict[str, Any], plan: Plan, generate: Generate,
                  key: str | None = None) -> MadeFromFew | None:
    """The code of a program of which few of many equal blocks are traced; None where that cannot be done.

    plain: a flat graph, which is not changed, over tensors like `given`. config: settings of Inductor for it. key: says all that
    the code depends on, besides PyTorch; with it code is kept on disk, and found there.
    """
    if not _as_by_themselves(plain.graph, given):
        return None
    key = None if key is None else compat.bundle_key(key)
    found = None if key is None else compat.kept_bundle(key, given)
    if found is not None:
        codes, rest = found
        return MadeFromFew(codes[0], codes[1] if len(codes) > 1 else None, *rest)
    made: list[MadeFromFew] = []

    def then(whole: Whole) -> None:
        with compat.waiting_once():
            made.append(_made(whole, generate))

    with compat.faked(given) as fakes:
        from_few_blocks(plain, [Input(x, "") for x in fakes], plan, config, then)
    if not made:
        return None
    if key is not None:
        one = made[0]
        compat.keep_bundle(key, [one.forward] if one.backward is None else [one.forward, one.backward],
                           (one.outputs, one.seeds, one.donated, one.like))
    return made[0]


def steps_from_few(plain: fx.GraphModule, given: list[Tensor], config: dict[str, Any], plan: Plan, cut: compat.Cut,
                   making: compat.Making) -> compat.TracedForward | None:
    """The steps of a program of which few of many equal blocks are traced; None where that cannot be done.

    plain, given, config: see `made_from_few`. cut, making: of `compile_steps`.
    """
    if not _as_by_themselves(plain.graph, given):
        return None
    made: list[compat.TracedForward] = []

    def then(whole: Whole) -> None:
        made.append(compat.steps_of(whole.forward, whole.backward, whole.outputs, whole.seeds, whole.donated, whole.options, cut,
                                    making))

    with compat.faked(given) as fakes:
        from_few_blocks(plain, [Input(x, "") for x in fakes], plan, config, then, in_steps=True)
    return made[0] if made else None


def _as_by_themselves(graph: fx.Graph, given: list[Tensor]) -> bool:
    """Whether code for inputs that have memory of their own is right for these: none is written to, or none shares memory with
    another (labels are often the ids themselves); and each begins where one by itself might, as a shorter program's inputs do."""
    apart = len({compat.storage_of(x) for x in given}) == len(given)
    return (apart or not any(compat.mutates(n.target) for n in graph.nodes)) and all(
        x.storage_offset() * x.element_size() % ALIGNED == 0 for x in given)


def _made(whole: Whole, generate: Generate) -> MadeFromFew:
    with stage(f"compiling the forward, 1 of {1 if whole.backward is None else 2}"):
        forward, strides = generate(whole.forward, whole.options[0], exact=whole.outputs)
    if whole.backward is None:
        return MadeFromFew(forward, None, whole.outputs, [], [], [])
    values = [n.meta["val"] for n in whole.backward.graph.find_nodes(op="placeholder")]
    saved = len(values) - len(whole.seeds)
    like = [x if s is None or x.stride() == tuple(s) else x.new_empty_strided(x.shape, tuple(s))
            for x, s in zip(values[:saved], strides[whole.outputs :], strict=True)] + values[saved:]
    moved = any(a is not b for a, b in zip(values, like, strict=True))
    results: Any = whole.backward.graph.output_node().args[0]
    with stage("compiling the backward, 2 of 2"):
        backward, _ = generate(whole.backward, whole.options[1], whole.donated, range(saved), len(results),
                               like if moved else None)
    return MadeFromFew(forward, backward, whole.outputs, whole.seeds, whole.donated, [Like.traced(x) for x in values[saved:]])

"""pool: one code recorded, and the memory that its recordings share, out of which they lend.

Every recording of a module writes to any of the pool. So nothing is played back, and nothing recorded, while something of it is
lent out: a forward's tensors until its backward came, gradients until they are let go. Gradients in ``.grad`` are then moved to
memory of their own. Whoever borrowed something is found by the references to its storage, however he came by them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fxpar import compat
from fxpar.ops.table import written_later


class Plays(Protocol):
    """Plays a recording back when it is called: `fxpar.compat.cudagraphs.Playback`."""

    def __call__(self) -> None: ...
    def forget(self) -> None: ...


class Device(Protocol):
    """What records: `fxpar.compat.CudaGraphs`. beside: a stream that is never recorded. another: one with a pool of its own."""

    device: torch.device
    beside: torch.cuda.Stream | None

    def another(self) -> Device: ...
    def record(self, code: compat.Code, inputs: list[Tensor]) -> tuple[list[Any], Plays]: ...
    def timed(self, run: Callable[[], Any]) -> tuple[Any, float, Callable[[], float]]: ...
    def most(self) -> int: ...
    def taken(self) -> int: ...
    def size(self) -> int: ...
    def alive(self) -> int: ...
    def give_back(self) -> None: ...
    def drawn(self) -> int: ...
    def occupied(self) -> str | None: ...


@dataclass
class Loan:
    """What one forward left for its backward. consumed: a backward has come, and may have overwritten it."""

    storage: Any
    consumed: bool = False

    def is_open(self) -> bool:
        return not self.consumed and compat.holders(self.storage) > 0


@dataclass
class Pool:
    """What is lent out of the pool. gradients: all tensors that are in a ``.grad``. given_up: recordings that are not played back
    any more, whose memory may still be lent out."""

    gradients: Callable[[], Iterable[Tensor]]
    loan: Loan | None = None
    lent: list[Any] = field(default_factory=list)
    given_up: list[Recording] = field(default_factory=list)

    def obstacle(self) -> str | None:
        """Why nothing may be played back now. Gradients that are in the way are moved, if that can be."""
        if self.loan is not None and self.loan.is_open():
            return "an earlier forward waits for its backward"
        if self._still_lent():
            self._move_gradients()
        if self._still_lent():
            return "gradients are held, and not in .grad alone"
        self.loan = None
        self.given_up.clear()
        return None

    def abandon(self) -> None:
        """The module is gone: nothing is played back any more, and no gradient is looked for. To be called by whoever is
        collected along with it, whose weak references are dead by then."""
        for recording in self.given_up:
            recording.forget()
        self.gradients = tuple

    def let_go(self) -> bool:
        """Have the memory of what is not played back any more given back, if nobody has anything of it; whether that is so."""
        if self.is_lent():
            return False
        self.given_up.clear()
        return True

    def is_lent(self) -> bool:
        """Whether somebody has anything of it; asks no tensor, and so may be called within a trace."""
        return (self.loan is not None and compat.holders(self.loan.storage) > 0) or self._still_lent()

    def _still_lent(self) -> bool:
        self.lent = [s for s in self.lent if compat.holders(s)]
        return bool(self.lent)

    @torch.no_grad()
    def _move_gradients(self) -> None:
        """Those that share their memory with other gradients at most: whoever else has it would see what is added to them."""
        lent: dict[int, list[Tensor]] = {compat.storage_number(s): [] for s in self.lent}
        for grad in self.gradients():
            lent.get(compat.storage_of(grad), []).append(grad)
        for s in self.lent:
            if len(found := lent[compat.storage_number(s)]) == compat.holders(s):
                for grad in found:
                    grad.data = grad.clone()


@dataclass(frozen=True)
class Place:
    """Where an output lies: at an address of the pool, or in an input. whole: it is that input itself. at: bytes from its
    beginning. nbytes, of: the extent of the memory that it shares with other outputs, and where that begins."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    at: int
    of: int = 0
    nbytes: int = 0
    input: int | None = None
    whole: bool = False

    def within(self, storage: Any, begins: int) -> Tensor:
        """It, in a storage that begins at this address."""
        return compat.tensor_in(storage, (self.at - begins) // self.dtype.itemsize, self.shape, self.strides, self.dtype)

    def of_inputs(self, inputs: Sequence[Tensor]) -> Tensor:
        assert self.input is not None
        given = inputs[self.input]
        if self.whole:
            return given
        begins = int(given.storage_offset()) * given.itemsize
        if given.dtype == self.dtype:  # a view, so that autograd sees what is written to the input
            return given.as_strided(self.shape, self.strides, (begins + self.at) // self.dtype.itemsize)
        return self.within(given.untyped_storage(), -begins)


class Recording:
    """One code, recorded for inputs like these.

    fixed: which of them stay where they are; the others are copied to `statics`. pooled: which of the fixed ones lie in the pool.
    places: of its outputs, None for those that are None. end: is recorded behind the code. made: the outputs of the pool, as
    long as what lies there is not to be overwritten by what is recorded next.
    """

    def __init__(self, device: Device, code: compat.Code, inputs: list[Tensor], fixed: Sequence[bool], end: Callable[[], None],
                 pooled: frozenset[int] = frozenset()):
        self.device = device.device
        self._addresses = [(i, x.data_ptr()) for i, (x, f) in enumerate(zip(inputs, fixed, strict=True)) if f]
        self._copied = [i for i, f in enumerate(fixed) if not f]
        self._statics = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
                         for x in (inputs[i] for i in self._copied)]
        self._fill(inputs)
        own = {compat.storage_of(s) for s in self._statics}
        first = {compat.storage_of(inputs[i]): i for i, _ in reversed(self._addresses) if i not in pooled}
        given, statics = list(inputs), iter(self._statics)
        offsets = [int(x.storage_offset()) * x.itemsize for x in given]
        whole = {id(inputs[i]): i for i in first.values()}
        inputs.clear()
        for i in self._copied:
            given[i] = next(statics)

        def run(given: list[Tensor]) -> list[Any]:
            outs = [x.clone() if isinstance(x, Tensor) and compat.storage_of(x) in own else x for x in code(given)]
            end()
            return outs

        with contextlib.nullcontext(list) if device.beside is None else written_later(device.beside) as write:
            outs, self.replay = device.record(run, given)
        self._tables: list[Tensor] = write()
        self.places: list[Place | None] = []
        for x in outs:
            if x is not None and not isinstance(x, Tensor):
                raise RuntimeError(f"the code makes a {type(x).__name__}")
            if x is None:
                self.places.append(None)
                continue
            storage, size = x.untyped_storage(), (x.shape, x.stride(), x.dtype)
            source = first.get(compat.storage_of(x))
            if source is None:
                self.places.append(Place(*size, x.data_ptr(), storage.data_ptr(), storage.nbytes()))
            else:
                at = int(x.storage_offset()) * x.itemsize - offsets[source]
                self.places.append(Place(*size, at, input=source, whole=whole.get(id(x)) == source))
        self.made = outs

    def fits(self, inputs: Sequence[Any]) -> bool:
        """Whether what is to stay where it is has done so."""
        return all(inputs[i].data_ptr() == address for i, address in self._addresses)

    def stays(self, addresses: Sequence[int]) -> bool:
        """As `fits`, by where that is now, in order."""
        return [address for _, address in self._addresses] == list(addresses)

    def forget(self) -> None:
        """It is not played back any more; what lies in its memory stays."""
        self.replay.forget()

    def play(self, inputs: Sequence[Tensor]) -> None:
        self._fill(inputs)
        self.replay()

    @torch.no_grad()
    def _fill(self, inputs: Sequence[Tensor]) -> None:
        if self._copied:
            torch._foreach_copy_(self._statics, [inputs[i] for i in self._copied])

    def copies(self, inputs: Sequence[Tensor], places: Iterable[Place | None]) -> Iterator[Tensor | None]:
        """Outputs, copied out of the pool."""
        for p in places:
            if p is None:
                yield None
            else:
                made = p.of_inputs(inputs) if p.input is not None else p.within(self._storage(p.of, p.nbytes), p.of)
                yield made if p.whole else made.clone()

    def lend_together(self, inputs: Sequence[Tensor], places: Sequence[Place | None]) -> tuple[list[Tensor | None], Any]:
        """Outputs, in one storage, which is returned besides; None if there are none in the pool."""
        pooled = [p for p in places if p is not None and p.input is None]
        begins = min((p.of for p in pooled), default=0)
        storage = self._storage(begins, max(p.of + p.nbytes for p in pooled) - begins) if pooled else None
        return [None if p is None else p.of_inputs(inputs) if p.input is not None else p.within(storage, begins)
                for p in places], storage

    def lend(self, inputs: Sequence[Tensor], begin: int = 0) -> tuple[list[Tensor | None], list[Any]]:
        """Outputs from this one on, each in a storage of its own as far as they share no memory, and the storages. One output
        twice is two."""
        storages: dict[int, Any] = {}
        outs: list[Tensor | None] = []
        seen: set[int] = set()
        for p in self.places[begin:]:
            if p is None or p.input is not None:
                outs.append(None if p is None else p.of_inputs(inputs))
                continue
            if p.of not in storages:
                storages[p.of] = self._storage(p.of, p.nbytes)
            made = p.within(storages[p.of], p.of)
            outs.append(made.clone() if p.at in seen else made)  # one gradient, of two parameters
            seen.add(p.at)
        return outs, list(storages.values())

    def _storage(self, begins: int, nbytes: int) -> Any:
        return compat.storage_at(begins, nbytes, self.device)

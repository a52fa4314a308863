"""Machines that models are trained on: what a device computes, holds and moves, and how devices are linked.

Each is a file in `clusters/`, with the public source of every number. A cluster that is not there is a file of the same form.
"""

from __future__ import annotations

import math
import re
import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from fxpar.errors import PlanError

_KIND = re.compile(r"\b[A-Z]\d{3}\b")
"""What tells a kind of device in its name."""


@dataclass(frozen=True)
class Link:
    """What connects the devices of one level of a cluster.

    level: its name, as "host". ranks: how many neighbouring ranks it connects; None: all.
    alpha: seconds that a message takes, however small. beta: bytes that a device sends in a second, in one direction, of
    large messages, as they were measured; peak: as the maker says.
    """

    level: str
    ranks: int | None
    alpha: float
    beta: float
    peak: float
    source: str

    def seconds(self, size: float) -> float:
        """Seconds for a message of `size` bytes between two devices."""
        return self.alpha + size / self.beta


@dataclass(frozen=True)
class Cluster:
    """Many devices of one kind.

    name: of the file. device: as its maker calls it. memory: bytes of a device. memory_bandwidth: bytes in a second.
    flops: pairs of a dtype's name and the dense operations in a second that the maker says; there are "float8", for all of
        its kinds, and "tfloat32", for float32 on tensor cores.
    efficiency: pairs of a dtype's name and the part of its flops that the matrix products of training steps were measured to
        reach; and "attention", the part that fused attention reached, where it was measured.
    links: from that between neighbours to that between all. sources: of all numbers but those of links, which have theirs.
    """

    name: str
    device: str
    memory: int
    memory_bandwidth: float
    flops: tuple[tuple[str, float], ...]
    efficiency: tuple[tuple[str, float], ...]
    links: tuple[Link, ...]
    sources: tuple[str, ...]

    def peak(self, dtype: torch.dtype | str) -> float:
        """FLOP/s that the maker says, of a dtype or its name. Raises PlanError for one that the device does not compute in."""
        name, flops = _name(dtype), dict(self.flops)
        if name not in flops:
            requirement = f"must be one that {self.device} computes in: {', '.join(flops)}"
            raise PlanError("param_dtype", name, requirement, "param_dtype=bf16")
        return flops[name]

    def reached(self, dtype: torch.dtype | str, attention: bool = False) -> float:
        """FLOP/s of a large matrix product, or of attention; of what was not measured, as efficient as the first that was."""
        parts = dict(self.efficiency)
        part = parts.get(_name(dtype), self.efficiency[0][1])
        return self.peak(dtype) * (parts.get("attention", part) if attention else part)

    def link(self, ranks: int) -> Link:
        """What a group communicates over whose members lie in one block of `ranks` neighbouring ranks: its slowest link."""
        return next(link for link in self.links if link.ranks is None or ranks <= link.ranks)

    def between(self, one: int, other: int) -> Link:
        """What two ranks communicate over, by their numbers."""
        return next(link for link in self.links if link.ranks is None or one // link.ranks == other // link.ranks)


def _name(dtype: torch.dtype | str) -> str:
    name = str(dtype).removeprefix("torch.")
    return "float8" if name.startswith("float8") else name


def clusters() -> tuple[str, ...]:
    """Names of the clusters that fxpar knows."""
    return tuple(sorted(file.name.removesuffix(".toml") for file in _folder().iterdir() if file.name.endswith(".toml")))


def cluster(name: str) -> Cluster:
    """A cluster that fxpar knows, or that a file describes.

    name: one of `clusters()`, or the path of a .toml file of the same form.
    Raises PlanError for `cluster` where there is no such, or its file lacks something.
    """
    requirement = f"must be one of {', '.join(clusters())}, or the path of a .toml file"
    try:
        if name in clusters():
            text = (_folder() / f"{name}.toml").read_text()
        elif name.endswith(".toml") and Path(name).is_file():
            text = Path(name).read_text()
        else:
            raise PlanError("cluster", name, requirement, clusters()[0])
        return _read(Path(name).name.removesuffix(".toml"), tomllib.loads(text))
    except PlanError:
        raise
    except OSError as error:
        raise PlanError("cluster", name, f"{requirement} ({error.strerror})", clusters()[0]) from None
    except KeyError as missing:
        raise PlanError("cluster", name, f"must say {missing.args[0]!r}, as fxpar's own do") from None
    except (tomllib.TOMLDecodeError, TypeError, ValueError) as error:
        raise PlanError("cluster", name, f"must be a description of a cluster: {error}") from None


def cluster_of(device: str) -> Cluster | None:
    """The cluster whose devices are of the kind of this one; None where fxpar knows none. device: what its driver calls it, as
    "NVIDIA A100-SXM4-80GB"."""
    kind = _KIND.findall(device)
    return next((made for made in map(cluster, clusters()) if kind and kind == _KIND.findall(made.device)), None)


def _folder() -> Any:
    return resources.files("fxpar.cost") / "clusters"


def _read(name: str, file: dict[str, Any]) -> Cluster:
    device, flops, efficiency = file["device"], dict(file["flops"]), dict(file["efficiency"])
    sources = tuple(table.pop("source") for table in (device, flops, efficiency))
    links = tuple(Link(link["level"], link.get("ranks"), _number("alpha", link["alpha"]), _number("beta", link["beta"]),
                       _number("peak", link["peak"]), link["source"]) for link in file["links"])
    if not efficiency or next(iter(efficiency)) not in flops:
        raise ValueError("its efficiency names no dtype first")
    if [link for link in links if link.ranks is None] != list(links[-1:]):
        raise ValueError("its last link, and no other, connects all ranks and says no number of them")
    reaches = [link.ranks or math.inf for link in links]
    if reaches != sorted(set(reaches)):
        raise ValueError("its links are to be in order, from that between neighbours to that between all ranks")
    return Cluster(name, device["name"], int(_number("memory_mib", device["memory_mib"]) * 2**20),
                   _number("memory_bandwidth", device["memory_bandwidth"]),
                   tuple((dtype, _number(dtype, value)) for dtype, value in flops.items()),
                   tuple((what, _number(what, value)) for what, value in efficiency.items()), links, sources)


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"its {key} is {value!r}, and has to be a positive number")
    return float(value)

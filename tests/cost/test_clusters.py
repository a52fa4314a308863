"""Descriptions of clusters, fxpar's own and others'."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fxpar.cost import clusters as module
from fxpar.cost.clusters import cluster, cluster_of, clusters
from fxpar.errors import PlanError

FOLDER = Path(module.__file__).parent / "clusters"


def test_names():
    assert clusters() == ("dgx-a100", "dgx-h100", "dgx-h200")


@pytest.mark.parametrize("name", clusters())
def test_numbers_are_possible_and_have_sources(name: str):
    found = cluster(name)
    assert found.name == name and len(found.sources) == 3 and all("https://" in source for source in found.sources)
    assert 2**36 < found.memory < 2**38 and 1e12 < found.memory_bandwidth < 1e13
    assert all(0.3 < part < 1 for _, part in found.efficiency)
    assert [link.level for link in found.links] == ["host", "network"]
    for link in found.links:
        assert 0.7 * link.peak < link.beta < link.peak and 1e-6 < link.alpha < 1e-4 and "https://" in link.source
    assert found.links[0].beta > 5 * found.links[1].beta
    assert found.peak(torch.bfloat16) == found.peak("float16") == 2 * found.peak("tfloat32") > 4 * found.peak(torch.float32)
    hash(found)


def test_a_device_computes_in_its_dtypes():
    h100, a100 = cluster("dgx-h100"), cluster("dgx-a100")
    assert h100.peak(torch.bfloat16) == 989.4e12 and a100.peak(torch.bfloat16) == 312e12
    assert h100.peak(torch.float8_e4m3fn) == h100.peak(torch.float8_e5m2) == 1978.9e12
    assert h100.reached(torch.bfloat16) == pytest.approx(0.62 * 989.4e12)
    assert h100.reached(torch.bfloat16, attention=True) == pytest.approx(0.40 * 989.4e12)
    assert a100.reached(torch.bfloat16, attention=True) == a100.reached(torch.bfloat16)  # it was not measured
    assert h100.reached(torch.float8_e4m3fn) == pytest.approx(1402.6e12, rel=1e-3)
    assert h100.reached(torch.float32) == pytest.approx(0.62 * 66.9e12)
    with pytest.raises(PlanError, match="must be one that NVIDIA A100 SXM4 80GB computes in: float16, bfloat16, "):
        a100.peak(torch.float8_e4m3fn)


def test_a_group_communicates_over_its_slowest_link():
    found = cluster("dgx-h100")
    assert [found.link(ranks).level for ranks in (2, 8, 9, 4096)] == ["host", "host", "network", "network"]
    assert found.link(16).seconds(45e9) == pytest.approx(1 + 14e-6)


def test_a_file_describes_another_cluster(tmp_path: Path):
    file = tmp_path / "ours.toml"
    file.write_text((FOLDER / "dgx-h100.toml").read_text().replace("ranks = 8", "ranks = 4"))
    ours = cluster(str(file))
    assert ours.name == "ours" and ours.link(8).level == "network"
    assert ours.flops == cluster("dgx-h100").flops


@pytest.mark.parametrize(("old", "new", "requirement"), [
    ("memory_mib", "memory", "must say 'memory_mib', as fxpar's own do"),
    ("[[links]]", "[[wires]]", "must say 'links'"),
    ("alpha = 3.4e-6", "latency = 3.4e-6", "must say 'alpha'"),
    ("memory_bandwidth = 3.35e12", 'memory_bandwidth = "fast"', "its memory_bandwidth is 'fast', and has to be a positive"),
    ("beta = 45e9", "beta = 0", "its beta is 0, and"),
    ("bfloat16 = 989.4e12", "bfloat16 = true", "its bfloat16 is True, and"),
    ("ranks = 8", "ranks = 8\nalpha = 1e-6\nbeta = 1e9\npeak = 1e9\nsource = 'ours'\n[[links]]\nlevel = 'rail'\nranks = 4",
     "its links are to be in order"),
    ("ranks = 8", "", "its last link, and no other, connects all ranks"),
    ('level = "network"', 'level = "network"\nranks = 64', "its last link, and no other, connects all ranks"),
    ("bfloat16 = 0.62\nattention", "attention", "its efficiency names no dtype first"),
    ("[device]", "[device", "must be a description of a cluster"),
])
def test_a_file_that_lacks_something_is_refused(tmp_path: Path, old: str, new: str, requirement: str):
    text = (FOLDER / "dgx-h100.toml").read_text()
    assert old in text
    (tmp_path / "ours.toml").write_text(text.replace(old, new))
    with pytest.raises(PlanError, match="plan field `cluster`") as error:
        cluster(str(tmp_path / "ours.toml"))
    assert requirement in str(error.value)


@pytest.mark.parametrize("name", ["dgx-h101", "nowhere.toml", "../clusters/dgx-h100"])
def test_an_unknown_cluster_is_refused(name: str):
    with pytest.raises(PlanError, match=r"one of dgx-a100, dgx-h100, dgx-h200, or the path of a .toml file; try dgx-a100"):
        cluster(name)


@pytest.mark.parametrize("device, name", [
    ("NVIDIA H100 80GB HBM3", "dgx-h100"), ("NVIDIA H200", "dgx-h200"), ("NVIDIA A100-SXM4-80GB", "dgx-a100"),
    ("NVIDIA GH200 480GB", None), ("NVIDIA GeForce RTX 4090", None),
])  # fmt: skip
def test_the_cluster_of_a_device(device: str, name: str | None):
    made = cluster_of(device)
    assert (made.name if made is not None else None) == name

"""Test runs are reproducible: hypothesis derives its examples, and torch its random numbers, from the test alone."""

import gc
import os
from collections.abc import Iterator

import pytest
import torch
import torch._inductor.config
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, settings
from torch.testing._internal.distributed.fake_pg import FakeStore

from fxpar.backends.transport.threads import Threads, as_rank
from fxpar.ops.dropout_attention import use_kernels
from fxpar.sharding.mesh import Mesh

settings.register_profile(
    "fxpar",
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile(
    "unshrunk",
    settings.get_profile("fxpar"),
    phases=[Phase.explicit, Phase.generate],
    report_multiple_bugs=False,
)  # for a first look at many failures
settings.load_profile("fxpar")
torch.set_num_threads(1)
torch._inductor.config.cpp.vec_isa_ok = True  # else each new cache begins with programs that try the compiler out
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # the same, for processes that are started
os.environ.setdefault("FXPAR_QUIET", "1")  # how long something takes depends on the machine, what tests read does not


def pytest_collection_finish() -> None:
    freeze()


def freeze() -> None:
    """What is there now is left alone by Python's garbage collector: `parallelize` looks at every object that it knows."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def few_objects():
    """What the tests before imported is left alone, too."""
    if len(gc.get_objects()) > 100_000:
        freeze()


@pytest.fixture(autouse=True)
def seeded():
    """What a test draws does not depend on the tests before it, nor on the clock."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_process_group():
    """`parallelize` makes a process group of one where there is none; no test leaves one to the next."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def one_rank() -> str:
    """A process group of one, in which collectives are real and change nothing; its name."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return dist.group.WORLD.group_name


@pytest.fixture
def one_thread() -> Iterator[str]:
    """A group of one whose collectives are simulated: done when they are waited for, in this thread; its name."""
    threads = Threads(Mesh(("only",), (1,)))
    with as_rank(0):
        yield threads.name(("only",))


def pretend(ranks: int) -> str:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    return dist.group.WORLD.group_name


@pytest.fixture
def dropout_written_out() -> Iterator[None]:
    """What is captured has its attention with dropout as products around a softmax."""
    use_kernels(False)
    yield
    use_kernels()


@pytest.fixture
def two_ranks() -> str:
    """A process group that says it has two ranks, and does not communicate; its name."""
    return pretend(2)


@pytest.fixture
def four_ranks() -> str:
    return pretend(4)

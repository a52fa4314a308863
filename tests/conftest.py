"""Test runs are reproducible: hypothesis derives its examples from the test alone."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

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


@pytest.fixture(autouse=True)
def no_process_group():
    """`parallelize` makes a process group of one where there is none; no test leaves one to the next."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

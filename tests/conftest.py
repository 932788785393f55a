"""Settings every test shares: hypothesis profiles, one thread, a fixed seed, and what runs where.

`make test` draws 10 networks for each law; in CI always the same ones. `make thorough` draws 2,000, and runs
what is marked as thorough, too.
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings


settings.register_profile("dev", max_examples=10, deadline=None)
settings.register_profile(
    "ci",
    max_examples=10,
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "thorough", parent=settings.get_profile("ci"), max_examples=2000, derandomize=False
)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev")
settings.load_profile(PROFILE)


def pytest_sessionstart(session):
    # Small tensors on a shared machine: more threads cost more than they give.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same for processes that tests start


def pytest_collection_modifyitems(config, items):
    if PROFILE != "thorough":
        left = [item for item in items if item.get_closest_marker("thorough") is not None]
        items[:] = [item for item in items if item.get_closest_marker("thorough") is None]
        config.hook.pytest_deselected(items=left)
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="needs CUDA")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(no_gpu)


@pytest.fixture(autouse=True)
def fixed_seed():
    if torch.accelerator.is_available():
        torch.manual_seed(0)
    else:  # manual_seed formats the stack once for every kind of device that is not there
        torch.default_generator.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """Settings that later tests, and users, would meet."""
    before = torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()
    yield
    after = torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()
    assert after == before, "the process runs attention in another way than before this test"

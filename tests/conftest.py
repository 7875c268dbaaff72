"""What every test starts from."""

import os
from collections.abc import Iterator

if "PYTEST_XDIST_WORKER" in os.environ:  # tests in parallel: one thread each, also in the processes that they start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

settings.register_profile("elit", deadline=None, max_examples=60)  # a busy machine must not fail a test
settings.load_profile("elit")


@pytest.fixture(autouse=True)
def _fixed_global_state() -> Iterator[None]:
    """One seed for every test; and the number of threads, which decides bits, is not what another test left."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))

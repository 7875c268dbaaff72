"""What every test starts from."""

from collections.abc import Iterator

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

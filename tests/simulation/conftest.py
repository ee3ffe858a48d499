"""What a killed process leaves open is closed here.

A real kill leaves open files to the kernel. What is killed inside the test's own process leaves them to the garbage
collector, and Python complains of each; so it is run here, between tests, and told not to.
"""

import gc
import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _bury_the_dead() -> Iterator[None]:
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()

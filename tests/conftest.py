"""What holds for every test."""

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Nothing depends on how fast the machine is.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing depends on what an earlier run has left, and nothing is left to the user."""
    os.environ["GRAPHC_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tvm() -> Any:
    """TVM, where it and a C++ compiler are installed."""
    found = pytest.importorskip("tvm", reason="TVM is not installed")
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler to link with")
    return found


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch computes with one thread."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

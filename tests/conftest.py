import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import gc

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def frozen_imports():
    """The Trainer collects garbage at the start of each training; what was imported need not be looked through."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def few_threads():
    """One, unless `make test-kernels` asks for more: tiny tensors gain nothing, and test processes share the cores."""
    torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))


@pytest.fixture(autouse=True)
def own_environment():
    """Precision and compilation that older Trainers set for the whole process end with the test."""
    before = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}
    yield
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def float64():
    """Models are built in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)

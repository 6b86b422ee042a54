"""Each op on each implementation that this machine has, with poisoned memory.

`torch.empty` and its kin are poisoned, so that an element that an op forgets to write shows. On a
machine with a GPU, tensors are made there by default and the Triton kernels run for real; elsewhere
they run in Triton's interpreter.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from specplus_kernels import cpu_library, dispatch

if dispatch.HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1":
    import tests.interpreted  # noqa: F401

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = pytest.param("triton", marks=pytest.mark.slow)  # in the interpreter it is


def pytest_configure(config: pytest.Config) -> None:
    """A machine with a GPU need not have pytest-timeout, whose marker this is."""
    config.addinivalue_line("markers", "timeout(seconds): of pytest-timeout")


def poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype.is_floating_point:
        return tensor.fill_(torch.nan)
    return tensor.fill_(torch.iinfo(tensor.dtype).max if tensor.dtype != torch.bool else 1)


def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda *args, **kwargs: poison(make(*args, **kwargs))


@pytest.fixture(autouse=True)
def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def _run_on(which: dispatch.Provider) -> Iterator[str]:
    if which == "cpu" and cpu_library.load() is None:
        pytest.skip("no C++ kernels in this installation")
    if which == "triton" and not dispatch.HAS_TRITON:
        pytest.skip("no Triton in this installation")
    device = DEVICE if which == "triton" else "cpu"
    with torch.device(device), dispatch.force(which):
        yield which


@pytest.fixture(params=["reference", "cpu"])
def provider(request: pytest.FixtureRequest) -> Iterator[str]:
    """Ops with a C++ kernel and no Triton kernel."""
    yield from _run_on(request.param)


@pytest.fixture(params=["reference", TRITON])
def gpu_provider(request: pytest.FixtureRequest) -> Iterator[str]:
    """Ops with a Triton kernel and no C++ kernel."""
    yield from _run_on(request.param)


@pytest.fixture(params=["reference", "cpu", TRITON])
def any_provider(request: pytest.FixtureRequest) -> Iterator[str]:
    """Ops with both."""
    yield from _run_on(request.param)

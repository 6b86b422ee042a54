"""Poisons torch.empty and its kin, so that an element that an op forgets to write shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from specplus_kernels import cpu_library, dispatch


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


@pytest.fixture(params=["reference", "cpu"])
def provider(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on each implementation that this machine has."""
    if request.param == "cpu" and cpu_library.load() is None:
        pytest.skip("no C++ kernels in this installation")
    with dispatch.force(request.param):
        yield request.param

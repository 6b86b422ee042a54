"""Which implementation runs, and what the log says about it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from specplus_kernels import cpu_library, dispatch, row_argmax

CPU = torch.device("cpu")


@pytest.fixture
def fresh_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Lets the test load another library; the next test loads the real one again."""
    cpu_library.load.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    cpu_library.load.cache_clear()


def test_without_the_library(
    fresh_library: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fresh_library.setattr(cpu_library, "PATH", tmp_path / "none.so")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert dispatch.provider(CPU) == "reference"
            assert row_argmax(torch.tensor([[1.0, 3.0, 2.0]])).item() == 1
    assert [record.message.count("slower torch reference") for record in caplog.records] == [1]


def test_broken_library(fresh_library: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken.so").write_bytes(b"no library")
    fresh_library.setattr(cpu_library, "PATH", tmp_path / "broken.so")
    assert cpu_library.load() is None


@pytest.mark.skipif(cpu_library.load() is None, reason="no C++ kernels in this installation")
def test_rule_and_override() -> None:
    assert dispatch.provider(CPU) == "cpu"
    assert dispatch.provider(torch.device("meta")) == "reference"
    with dispatch.force("reference"):
        assert dispatch.provider(CPU) == "reference"
    assert dispatch.provider(CPU) == "cpu"


@pytest.mark.skipif(cpu_library.load() is None, reason="no C++ kernels in this installation")
def test_old_library_is_told_apart() -> None:
    kernel = cpu_library.Kernel("specplus_row_argmax", "5q")
    with pytest.raises(RuntimeError, match="older than its sources"):
        kernel(0, 0, 0, 0, 0)


def test_downgrade_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            dispatch.downgrade("some_op", "a reason of this test")
    assert len(caplog.records) == 1

"""Which implementation of an op runs: one rule, one override for tests.

The rule: a CPU tensor runs the C++ kernel when the library is loaded, anything else the torch
reference. The C++ kernels do not take every argument; what one refuses runs the reference too,
and the log says so once per op and reason.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from specplus_kernels import cpu_library

Provider = Literal["reference", "cpu"]

logger = logging.getLogger(__name__)
_forced: Provider | None = None
_told: set[tuple[str, str]] = set()


def provider(device: torch.device) -> Provider:
    """The implementation for tensors on `device`."""
    if _forced is not None:
        return _forced
    return "cpu" if device.type == "cpu" and cpu_library.load() is not None else "reference"


def downgrade(op: str, reason: str) -> Provider:
    """Replaces the C++ kernel of `op`, which refuses these arguments for `reason`.

    Raises:
        NotImplementedError: when a test forces the C++ kernel, so that it cannot pass without it.

    """
    if _forced == "cpu":
        raise NotImplementedError(f"the CPU kernel of {op} does not take {reason}")
    if (op, reason) not in _told:
        _told.add((op, reason))
        logger.warning("The CPU kernel of %s does not take %s: the reference runs.", op, reason)
    return "reference"


@contextmanager
def force(which: Provider) -> Iterator[None]:
    """Runs every op inside the block on `which`; for tests and benchmarks."""
    global _forced
    before, _forced = _forced, which
    try:
        yield
    finally:
        _forced = before

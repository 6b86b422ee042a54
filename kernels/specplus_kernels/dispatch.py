"""Which implementation of an op runs: one rule, one override for tests.

The rule: a CUDA tensor runs the Triton kernel, a CPU tensor the C++ kernel when the library is
loaded, anything else the torch reference. An op without a kernel of that sort runs its reference.
Not every kernel takes every argument; what one refuses runs the reference too, and the log says so
once per op and reason.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Literal

import torch

from specplus_kernels import cpu_library

Provider = Literal["reference", "cpu", "triton"]

HAS_TRITON = find_spec("triton") is not None
logger = logging.getLogger(__name__)
_forced: Provider | None = None
_told: set[tuple[str, str]] = set()


def provider(device: torch.device) -> Provider:
    """The implementation for tensors on `device`."""
    if _forced is not None:
        return _forced
    if device.type == "cuda" and HAS_TRITON:
        return "triton"
    return "cpu" if device.type == "cpu" and cpu_library.load() is not None else "reference"


def downgrade(op: str, reason: str) -> Provider:
    """Replaces the kernel of `op`, which refuses these arguments for `reason`.

    Raises:
        NotImplementedError: when a test forces a kernel, so that it cannot pass without it.

    """
    if _forced in ("cpu", "triton"):
        raise NotImplementedError(f"the {_forced} kernel of {op} does not take {reason}")
    if (op, reason) not in _told:
        _told.add((op, reason))
        logger.warning("The kernel of %s does not take %s: the reference runs.", op, reason)
    return "reference"


@contextmanager
def force(which: Provider) -> Iterator[None]:
    """Runs every op inside the block on `which`; for tests and benchmarks.

    `triton` on CPU tensors needs TRITON_INTERPRET=1 in the environment before triton is imported.
    """
    global _forced
    before, _forced = _forced, which
    try:
        yield
    finally:
        _forced = before

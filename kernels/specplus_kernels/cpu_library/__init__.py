"""Loads the C++ kernels (`_cpu_kernels.so`, one library for all ops) with ctypes.

Every kernel has the C signature `int64_t name(const Params *, int64_t size)`, where `Params` is a
struct of 64-bit fields only. Python packs it with `struct`, which is several times faster than
ctypes' own conversion of some thirty arguments. `size` shows a library older than its Python side.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import struct
from collections.abc import Callable
from pathlib import Path

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PATH = Path(__file__).resolve().parents[1] / "_cpu_kernels.so"
STALE = -1

logger = logging.getLogger(__name__)


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library, or None (said once) when it was not built or cannot run on this CPU."""
    try:
        library = ctypes.CDLL(str(PATH))
        if library.specplus_cpu_supported():
            return library
        reason = "it was compiled for another CPU"
    except (OSError, AttributeError) as error:
        reason = str(error)
    logger.warning("No compiled CPU kernels (%s): the slower torch reference runs.", reason)
    return None


class Kernel:
    """One C++ kernel: packs its parameters and calls it.

    Args:
        name: the C symbol.
        fields: `struct` codes of the parameters, only `q` (int64, pointers too) and `d` (double).

    """

    def __init__(self, name: str, fields: str) -> None:
        self._name = name
        self._params = struct.Struct("=" + fields)

    @functools.cached_property
    def _function(self) -> Callable[[bytes, int], int]:
        library = load()
        assert library is not None, f"{self._name} called without the library"
        try:
            function = getattr(library, self._name)
        except AttributeError:
            return lambda params, size: STALE
        function.argtypes = (ctypes.c_char_p, ctypes.c_int64)
        function.restype = ctypes.c_int64
        return function

    def __call__(self, *params: float) -> int:
        """Runs the kernel; its return value, 0 for success.

        Raises:
            RuntimeError: the library was built from other sources than this file.

        """
        code = self._function(self._params.pack(*params), self._params.size)
        if code == STALE:
            raise RuntimeError(f"{PATH} is older than its sources: run `make setup` to rebuild it")
        return code

"""Triton's interpreter without the work that it does again at every call or drops: import it once
TRITON_INTERPRET is set, before kernels run.

What kernels compute stays as it is: the same operations, in the same order, on the same types.
Seen to fail, in tests/kernels: types told apart by the first letters of their names.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from math import prod
from typing import Any

import numpy as np
from triton import language as tl
from triton.runtime import interpreter

# It computes for every sum whether that overflowed, and without `debug` looks at none of it.
_builder = interpreter.interpreter_builder
_builder.options = replace(_builder.options, sanitize_overflow=False)

# It gives `triton.language` its own functions at every launch and every call of a function, and
# takes them away again. All kernels of the process are interpreted: they may stay.
interpreter._patch_lang = cache(interpreter._patch_lang)
interpreter._LangPatchScope.restore = lambda scope: None

_of_type = interpreter._get_np_dtype
_by_name: dict[str, np.dtype] = {}


def _get_np_dtype(tt_dtype: Any) -> np.dtype:
    """It makes a table of all types for every value."""
    if tt_dtype.name not in _by_name:
        _by_name[tt_dtype.name] = _of_type(tt_dtype)
    return _by_name[tt_dtype.name]


interpreter._get_np_dtype = _get_np_dtype


@cache
def _sized(shape: tuple[int, ...]) -> tuple[tl.tuple, tl.constexpr]:
    return tl.tuple([tl.constexpr(size) for size in shape]), tl.constexpr(prod(shape))


def _init_tensor(self: tl.tensor, handle: Any, type: tl.dtype) -> None:
    """It makes the constants of a shape anew for every value."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _sized(tuple(type.shape) if type.is_block() else ())


tl.tensor.__init__ = _init_tensor

_init_checked = tl.block_type.__init__


_of_blocks: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}


def _init_block_type(self: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
    """It checks a block's shape and writes its name anew for every value."""
    sizes = tuple([s.value if isinstance(s, tl.constexpr) else s for s in shape])
    if (element_ty.name, sizes) not in _of_blocks:
        _init_checked(self, element_ty, [*sizes])
        _of_blocks[element_ty.name, sizes] = vars(self).copy()
    vars(self).update(_of_blocks[element_ty.name, sizes], element_ty=element_ty)


tl.block_type.__init__ = _init_block_type

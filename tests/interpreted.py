"""Triton's interpreter without the work that it does again at every call or drops: import it once
TRITON_INTERPRET is set, before kernels run.

What kernels compute stays as it is: the same operations, in the same order, on the same types.
Seen to fail, in tests/kernels: types told apart by the first letters of their names.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
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

"""Triton's interpreter without the work that it does again at every call or drops: import it once
TRITON_INTERPRET is set, before kernels run.

What kernels compute stays as it is: the same operations, in the same order, on the same types
(tests/test_interpreted.py). It changes `triton.language` for the whole process.
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

_semantic = interpreter.interpreter_semantic
_broadcast_anew = _semantic.broadcast_impl_value
_promote_anew = _semantic.computation_type_impl
_literal_anew = _semantic.scalar_constant
_promoted: dict[tuple[Any, ...], tl.dtype] = {}
_literals: dict[tuple[Any, ...], np.ndarray] = {}


def _broadcast(lhs: tl.tensor, rhs: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """It compares equal shapes as constants, one size after the other."""
    return (lhs, rhs) if lhs.shape is rhs.shape else _broadcast_anew(lhs, rhs)


def _promote(a: tl.dtype, a_literal: bool, b: tl.dtype, b_literal: bool, divides: bool) -> tl.dtype:
    """It promotes two types anew for every two values."""
    key = (a.name, a_literal, b.name, b_literal, divides)
    if key not in _promoted:
        _promoted[key] = _promote_anew(a, a_literal, b, b_literal, divides)
    return _promoted[key]


def _literal(value: Any, dtype: tl.dtype) -> tl.tensor:
    """It makes a literal anew wherever a kernel has one."""
    key = (type(value), repr(value), dtype.name)
    if key not in _literals:
        _literals[key] = _literal_anew(value, dtype).handle.data
        _literals[key].setflags(write=False)
    return tl.tensor(interpreter.TensorHandle(_literals[key], dtype), dtype)


_semantic.broadcast_impl_value = _broadcast
_semantic.computation_type_impl = _promote
_semantic.scalar_constant = _literal

# It looks for `tl` in the globals of a kernel; those of any function of this module will do. From
# here on `tl.tensor` has the interpreter's operators.
interpreter._patch_lang(_literal)

_INTEGERS = frozenset({"int32", "int64"})
ARITHMETIC: dict[str, np.ufunc] = {
    "__add__": np.add,
    "__radd__": np.add,
    "__sub__": np.subtract,
    "__mul__": np.multiply,
    "__rmul__": np.multiply,
}
COMPARISONS: dict[str, np.ufunc] = {
    "__lt__": np.less,
    "__le__": np.less_equal,
    "__gt__": np.greater,
    "__ge__": np.greater_equal,
    "__eq__": np.equal,
    "__ne__": np.not_equal,
}


def _operator(name: str, ufunc: np.ufunc) -> Any:
    """It takes forty microseconds for what numpy does in one. Numpy is asked at once for two values
    of int32, int64 or float32, for integers with a literal, and for a pointer and its offset."""
    slow = getattr(tl.tensor, name)

    def operator(self: tl.tensor, other: Any) -> tl.tensor:
        kind = self.dtype.name
        if isinstance(other, tl.constexpr):
            other = other.value
        if type(other) is int and kind in _INTEGERS and -(2**31) <= other < 2**31:
            other = _literal(other, self.dtype)
        if type(other) is not tl.tensor or not _fits(self, other):
            return slow(self, other)
        if other.dtype.name == kind and (kind in _INTEGERS or kind == "fp32"):
            type_ = self.type
            if name in COMPARISONS:
                type_ = type_.with_element_ty(tl.int1) if type_.is_block() else tl.int1
            data = ufunc(self.handle.data, other.handle.data)
            return tl.tensor(interpreter.TensorHandle(data, self.handle.dtype), type_)
        if ufunc is np.add and self.dtype.is_ptr() and other.dtype.name in _INTEGERS:
            handle = interpreter.interpreter_builder.create_addptr(self.handle, other.handle)
            return tl.tensor(handle, self.type)
        return slow(self, other)

    operator.__wrapped__ = slow  # type: ignore[attr-defined]
    return operator


def _fits(lhs: tl.tensor, rhs: tl.tensor) -> bool:
    """Whether what comes out has the shape of `lhs`."""
    return lhs.shape is rhs.shape or not rhs.type.is_block()


for _name, _ufunc in (ARITHMETIC | COMPARISONS).items():
    setattr(tl.tensor, _name, _operator(_name, _ufunc))

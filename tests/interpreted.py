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

_PLAIN = (tl.int32, tl.int64, tl.uint32, tl.float32)
"""Types that numpy computes as the interpreter does."""
_NUMPY = {of.name: _of_type(of) for of in _PLAIN}
_COMPUTED_AS = {(of.name, of.name): of for of in _PLAIN} | {
    ("int32", "int64"): tl.int64,
    ("int64", "int32"): tl.int64,
}
_LITERALS_OF = {"int32": (-(2**31), 2**31), "int64": (-(2**31), 2**31), "uint32": (0, 2**32)}
"""Beside a value of a type: from where up to where literals surely take that type."""
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


def _is_literal(value: Any, kind: str) -> bool:
    """Whether a number takes the type `kind` as it is."""
    if kind == "fp32":
        return type(value) is float
    low, end = _LITERALS_OF.get(kind, (0, 0))
    return type(value) is int and low <= value < end


def _of_shape(type_: tl.dtype, element: tl.dtype) -> tl.dtype:
    return type_.with_element_ty(element) if type_.is_block() else element


def _operator(name: str, ufunc: np.ufunc) -> Any:
    """It takes forty microseconds for what numpy does in one. Numpy is asked at once for values of
    int32, int64, uint32 and float32, their literals, and for a pointer and its offset."""
    slow = getattr(tl.tensor, name)

    def operator(self: tl.tensor, other: Any) -> tl.tensor:
        if isinstance(other, tl.constexpr):
            other = other.value
        kind = self.dtype.name
        if type(other) is not tl.tensor:
            if _is_literal(other, kind):
                other = _literal(other, self.dtype)
            elif self.dtype.is_ptr() and _is_literal(other, "int32"):
                other = _literal(other, tl.int32)
            else:
                return slow(self, other)
        if self.shape is other.shape or not other.type.is_block():
            type_ = self.type
        elif not self.type.is_block():
            type_ = other.type
        else:
            return slow(self, other)
        if ufunc is np.add and self.dtype.is_ptr() and other.dtype.name in ("int32", "int64"):
            handle = _builder.create_addptr(self.handle, other.handle)
            return tl.tensor(handle, _of_shape(type_, self.dtype))
        computed_as = _COMPUTED_AS.get((kind, other.dtype.name))
        if computed_as is None:
            return slow(self, other)
        data = ufunc(self.handle.data, other.handle.data)
        result = tl.int1 if name in COMPARISONS else computed_as
        return tl.tensor(interpreter.TensorHandle(data, computed_as), _of_shape(type_, result))

    operator.__wrapped__ = slow  # type: ignore[attr-defined]
    return operator


for _name, _ufunc in (ARITHMETIC | COMPARISONS).items():
    setattr(tl.tensor, _name, _operator(_name, _ufunc))

_load_checked, _store_checked, _arange_anew = tl.load, tl.store, tl.arange


def _places(pointer: Any, mask: Any) -> tuple[np.ndarray, np.ndarray, str] | None:
    """Addresses, which of them are meant, and the kind of what is there, where all is plain."""
    if type(pointer) is not tl.tensor or not pointer.dtype.is_ptr():
        return None
    addresses, kind = pointer.handle.data, pointer.dtype.element_ty.name
    if kind not in _NUMPY:
        return None
    if mask is None:
        return addresses, np.ones(addresses.shape, dtype=bool), kind
    if type(mask) is not tl.tensor or mask.shape is not pointer.shape:
        return None
    meant = mask.handle.data
    return (addresses, meant, kind) if mask.dtype is tl.int1 and meant.dtype == bool else None


def _values(value: Any, pointer: tl.tensor, kind: str) -> np.ndarray | None:
    """What is stored, or loaded where the mask is not, if it has the pointer's shape and kind."""
    if isinstance(value, tl.constexpr):
        value = value.value
    if _is_literal(value, kind):
        return np.full(pointer.handle.data.shape, value, dtype=_NUMPY[kind])
    if type(value) is tl.tensor and value.shape is pointer.shape and value.dtype.name == kind:
        return value.handle.data
    return None


def _load(pointer: Any, mask: Any = None, other: Any = None, **hints: Any) -> tl.tensor:
    """It takes as long to ask what kind of load this is."""
    refused = mask is None and other is not None
    places = None if hints or refused else _places(pointer, mask)
    if places is not None:
        addresses, meant, kind = places
        nothing = other is None
        given = (
            np.zeros(addresses.shape, _NUMPY[kind]) if nothing else _values(other, pointer, kind)
        )
        if given is not None:
            element = pointer.dtype.element_ty
            data = interpreter._interpreter.load(addresses, meant, given, _NUMPY[kind])
            handle = interpreter.TensorHandle(data, element)
            return tl.tensor(handle, _of_shape(pointer.type, element))
    return _load_checked(pointer, mask, other, **hints)


def _store(pointer: Any, value: Any, mask: Any = None, **hints: Any) -> Any:
    """See `_load`."""
    places = None if hints else _places(pointer, mask)
    if places is not None and not pointer.dtype.const:
        addresses, meant, kind = places
        values = _values(value, pointer, kind)
        if values is not None:
            interpreter._interpreter.store(addresses, values, meant)
            return None
    return _store_checked(pointer, value, mask, **hints)


@cache
def _range(start: int, end: int) -> tl.tensor:
    made = _arange_anew(start, end)
    made.handle.data.setflags(write=False)
    return made


def _arange(start: Any, end: Any) -> tl.tensor:
    """It makes the same numbers again and again."""
    start, end = (n.value if isinstance(n, tl.constexpr) else n for n in (start, end))
    if type(start) is not int or type(end) is not int:
        return _arange_anew(start, end)
    made = _range(start, end)
    return tl.tensor(interpreter.TensorHandle(made.handle.data, made.handle.dtype), made.type)


_load.__wrapped__, _store.__wrapped__ = _load_checked, _store_checked  # type: ignore[attr-defined]
tl.load, tl.store, tl.arange = _load, _store, _arange

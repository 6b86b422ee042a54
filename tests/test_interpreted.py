"""Operators of tests/interpreted.py give what the interpreter's own give: values, types, shapes.

Seen to fail: sums taken for comparisons; a scalar's shape for a block's; literals kept by value
alone, where 1 is True and 0.0 is -0.0; promoted types kept by the two types alone.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
from specplus_kernels import dispatch

if not dispatch.HAS_TRITON:
    pytest.skip("no Triton in this installation", allow_module_level=True)

from triton import language as tl
from triton.runtime.interpreter import TensorHandle, interpreter_semantic

from tests import interpreted

TYPES = (tl.int32, tl.int64, tl.float32, tl.uint32, tl.int1)
SHAPES = ((), (4,), (2, 4), (1, 4))
LITERALS = (0, 3, -1, 2**31 - 1, 2**40, 0.5, 0.0, -0.0, True)


def tensor(dtype: tl.dtype, shape: tuple[int, ...], seed: int) -> tl.tensor:
    """Small and very large numbers, some of them equal from seed to seed."""
    numbers = np.random.default_rng(seed).choice([0, 1, 2, 5, 2**31 - 1], shape or (1,))
    handle = TensorHandle(numbers.astype(interpreted._get_np_dtype(dtype)), dtype)
    return tl.tensor(handle, tl.block_type(dtype, list(shape)) if shape else dtype)


def pointer(shape: tuple[int, ...]) -> tl.tensor:
    dtype = tl.pointer_type(tl.float32)
    handle = TensorHandle(np.full(shape or (1,), 1 << 40, dtype=np.uint64), dtype)
    return tl.tensor(handle, tl.block_type(dtype, list(shape)) if shape else dtype)


def as_it_was() -> Any:
    """The interpreter without the caches that operators use."""
    return mock.patch.multiple(
        interpreter_semantic,
        broadcast_impl_value=interpreted._broadcast,
        computation_type_impl=interpreted._computation_type,
        scalar_constant=interpreted._scalar_constant,
    )


def outcome(operator: Any, lhs: tl.tensor, rhs: Any) -> Any:
    try:
        result = operator(lhs, rhs)
    except Exception as error:
        return type(error)
    data = result.handle.data
    sizes = result.type.shape if result.type.is_block() else ()
    return repr(data.tolist()), data.dtype, str(result.type), tuple(sizes), str(result.handle.dtype)


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("name", interpreted._OPERATORS)
def test_operators(name: str) -> None:
    operator = getattr(tl.tensor, name)
    lefts = [tensor(dtype, shape, 1) for dtype in TYPES for shape in SHAPES]
    rights = [tensor(dtype, shape, 2) for dtype in TYPES for shape in SHAPES]
    literals = [*LITERALS, *map(tl.constexpr, LITERALS)]
    for lhs in [*lefts, *map(pointer, SHAPES)]:
        for rhs in [*rights, *literals]:
            ours = outcome(operator, lhs, rhs)
            with as_it_was():
                assert outcome(operator.__wrapped__, lhs, rhs) == ours

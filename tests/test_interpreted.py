"""Operators of tests/interpreted.py give what the interpreter's own give: values, types, shapes.

Seen to fail: sums taken for comparisons; a scalar's shape for a block's; literals kept by value
alone, where 1 is True and 0.0 is -0.0; promoted types kept by the two types alone.
"""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import numpy as np
import pytest
from specplus_kernels import dispatch

if not dispatch.HAS_TRITON:
    pytest.skip("no Triton in this installation", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton compiles here, for a GPU", allow_module_level=True)

from triton import language as tl
from triton.runtime.interpreter import TensorHandle, interpreter_semantic

from tests import interpreted

TYPES = (
    *(tl.int32, tl.int64, tl.float32),
    *(tl.int1, tl.int8, tl.uint32, tl.uint64, tl.float16, tl.bfloat16, tl.float64),
)
SHAPES = ((), (4,), (2, 4), (1, 4))
LITERALS = (0, 3, -1, 2**31 - 1, 2**40, 0.5, 0.0, -0.0, float("nan"), float("inf"), True)
NUMBERS = (0, 1, 2, 5, 2**31 - 1)
REALS = (0.0, -0.0, 1.5, float("nan"), float("inf"))


def of(dtype: tl.dtype, shape: tuple[int, ...], data: np.ndarray) -> tl.tensor:
    type_ = tl.block_type(dtype, list(shape)) if shape else dtype
    return tl.tensor(TensorHandle(data, dtype), type_)


def tensor(dtype: tl.dtype, shape: tuple[int, ...], seed: int) -> tl.tensor:
    """Small and very large numbers, some of them equal from seed to seed."""
    numbers = REALS if dtype.name in ("fp16", "fp32", "fp64") else NUMBERS
    drawn = np.random.default_rng(seed).choice(numbers, shape or (1,))
    return of(dtype, shape, drawn.astype(interpreted._get_np_dtype(dtype)))


def operands(seed: int) -> list[tl.tensor]:
    """Of every type and shape; what comparisons give, whose data and types are of two kinds; large
    arguments of a kernel, which are unsigned within; pointers."""
    made = [tensor(dtype, shape, seed) for dtype in TYPES for shape in SHAPES]
    made += [tensor(tl.int32, shape, seed) < 2 for shape in SHAPES]
    made.append(of(tl.int64, (), np.array([2**31 + 5], dtype=np.uint32)))
    for shape in SHAPES:
        places = np.full(shape or (1,), 1 << 40, dtype=np.uint64)
        made.append(of(tl.pointer_type(tl.float32), shape, places))
    return made


def as_it_was() -> Any:
    """The interpreter without the caches that operators use."""
    return mock.patch.multiple(
        interpreter_semantic,
        broadcast_impl_value=interpreted._broadcast_anew,
        computation_type_impl=interpreted._promote_anew,
        scalar_constant=interpreted._literal_anew,
    )


def outcome(operator: Any, lhs: tl.tensor, rhs: Any) -> Any:
    """All of a result, or the kind of error: both ways must refuse the same operands."""
    try:
        result = operator(lhs, rhs)
    except Exception as error:
        return type(error)
    data = result.handle.data
    sizes = result.type.shape if result.type.is_block() else ()
    return repr(data.tolist()), data.dtype, str(result.type), tuple(sizes), str(result.handle.dtype)


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize("name", interpreted.ARITHMETIC | interpreted.COMPARISONS)
def test_operators(name: str) -> None:
    operator, outcomes = getattr(tl.tensor, name), []
    for lhs in operands(1):
        for rhs in [*operands(2), *LITERALS, *map(tl.constexpr, LITERALS)]:
            ours = outcome(operator, lhs, rhs)
            with as_it_was():
                assert outcome(operator.__wrapped__, lhs, rhs) == ours
            outcomes.append(ours)
    assert sum(isinstance(ours, tuple) for ours in outcomes) > len(outcomes) / 2, "most raise"

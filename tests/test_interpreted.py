"""What tests/interpreted.py computes is what the interpreter's own functions give: values, types,
shapes, and the memory after a store.

Seen to fail: sums taken for comparisons; a scalar's shape for a block's; literals kept by value
alone, where 1 is True and 0.0 is -0.0; promoted types kept by the two types alone; int32 and int64
computed as int32; negative literals beside uint32; ones where nothing is loaded; masks of another
shape, or none, in loads and stores; ranges from 0.
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
LITERALS = (
    0,
    3,
    -1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    -(2**31),
    2**40,
    0.5,
    0.0,
    -0.0,
    float("nan"),
    float("inf"),
    True,
)
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


def memory(dtype: tl.dtype, shape: tuple[int, ...], backwards: bool) -> tuple[np.ndarray, Any]:
    """Eight values, and pointers to some of them."""
    known = tensor(dtype, (8,), seed=3).handle.data.copy()
    places = np.arange(8)[:: -1 if backwards else 1][: int(np.prod(shape))].reshape(shape or (1,))
    addresses = (known.ctypes.data + known.itemsize * places).astype(np.uint64)
    return known, of(tl.pointer_type(dtype), shape, addresses)


def masks(shape: tuple[int, ...]) -> list[Any]:
    """None, of the same shape and of another, a reduced one, constants."""
    reduced = of(tl.int1, shape, tensor(tl.int1, shape, 5).handle.data.astype(np.int8))
    return [
        *(None, True, False, tl.constexpr(True)),
        *(tensor(tl.int1, of_mask, 4) for of_mask in {(), (1, 4), shape}),
        reduced,
    ]


def given(dtype: tl.dtype, shape: tuple[int, ...]) -> list[Any]:
    """Values of this type and others, of this shape and another, and literals."""
    return [
        *(tensor(kind, shape, 6) for kind in (dtype, *TYPES[:5])),
        *(tensor(dtype, (), 6), tensor(dtype, (1, 4), 6)),
        of(tl.int64, (), np.array([2**31 + 5], dtype=np.uint32)),
        *(*LITERALS, tl.constexpr(2), tl.constexpr(0.5)),
    ]


CASES = [(dtype, shape) for dtype in TYPES for shape in SHAPES]


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize(("dtype", "shape"), CASES, ids=str)
def test_loads(dtype: tl.dtype, shape: tuple[int, ...]) -> None:
    known, pointer = memory(dtype, shape, backwards=True)
    outcomes = []
    for mask in masks(shape):
        for other in [None, *given(dtype, shape)]:
            ours = outcome(lambda p, m, o=other: tl.load(p, m, o), pointer, mask)
            with as_it_was():
                checked = outcome(lambda p, m, o=other: tl.load.__wrapped__(p, m, o), pointer, mask)
            assert ours == checked
            outcomes.append(ours)
    assert sum(isinstance(ours, tuple) for ours in outcomes) > len(outcomes) / 3, "most raise"
    hinted = outcome(lambda p, m: tl.load(p, m, cache_modifier=".cg"), pointer, None)
    assert hinted == outcome(lambda p, m: tl.load(p, m), pointer, None)
    assert len(known) == 8, "the memory must outlive what reads it"


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize(("dtype", "shape"), CASES, ids=str)
def test_stores(dtype: tl.dtype, shape: tuple[int, ...]) -> None:
    def stored(store: Any, mask: Any, value: Any) -> Any:
        known, pointer = memory(dtype, shape, backwards=False)
        try:
            store(pointer, value, mask)
        except (AssertionError, TypeError, ValueError, OverflowError) as error:
            return type(error)
        return known.tobytes()

    changed = 0
    before = memory(dtype, shape, backwards=False)[0].tobytes()
    for mask in masks(shape):
        for value in given(dtype, shape):
            ours, checked = (stored(s, mask, value) for s in (tl.store, tl.store.__wrapped__))
            assert ours == checked
            changed += isinstance(ours, bytes) and ours != before
    assert changed > 10


def test_nothing_is_stored_to_constants() -> None:
    known, pointer = memory(tl.int32, (4,), backwards=False)
    pointer = of(tl.pointer_type(tl.int32, const=True), (4,), pointer.handle.data)
    with pytest.raises(ValueError, match="constant pointer"):
        tl.store(pointer, tensor(tl.int32, (4,), 6))
    assert (known == tensor(tl.int32, (8,), seed=3).handle.data).all()


def test_ranges() -> None:
    value = tensor(tl.int32, (), 1)
    for start, end in [
        (0, 8),
        (tl.constexpr(4), 8),
        (0, tl.constexpr(1)),
        (0, 6),
        (8, 0),
        (0, value),
    ]:
        for _ in range(2):
            ours = outcome(lambda a, b: tl.arange(a, b), start, end)
            assert ours == outcome(interpreted._arange_anew, start, end)

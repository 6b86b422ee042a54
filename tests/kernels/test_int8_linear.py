"""int8_linear: against dense products, with odd shapes, few and many inputs.

Seen to fail: a panel's last rows left out, the sum of the lower bytes not taken off, scales of
another panel, inputs of eight bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from specplus_kernels import Int8Weight, cpu_library, dispatch, int8_linear
from specplus_kernels.int8_linear import cpu

from tests.kernels.conftest import DEVICE

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="int8_linear is a kernel of CPUs")


@pytest.fixture(params=["reference", "cpu"], autouse=True)
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "cpu" and (cpu_library.load() is None or not cpu.is_built()):
        pytest.skip("int8_linear's kernel needs a library built on a CPU with AVX512-VNNI")
    with dispatch.force(request.param):
        yield


@pytest.mark.parametrize("num_rows", [0, 1, 3, 8, 9, 21])
@pytest.mark.parametrize(("num_out", "num_in"), [(1, 1), (15, 6), (16, 64), (100, 33), (700, 640)])
def test_is_the_dense_product(num_rows: int, num_out: int, num_in: int) -> None:
    x, weight = torch.randn(num_rows, num_in), torch.randn(num_out, num_in)
    packed = Int8Weight.of(weight)
    expected = x.double() @ packed.dense().double().T
    torch.testing.assert_close(int8_linear(x, packed).double(), expected, rtol=1e-4, atol=5e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inputs_of_16_bits_of_any_stride(dtype: torch.dtype) -> None:
    x = torch.randn(6, 100).to(dtype)[::2, :48]
    packed = Int8Weight.of(torch.randn(32, 48))
    expected = x.float() @ packed.dense().T
    torch.testing.assert_close(int8_linear(x, packed), expected, rtol=1e-4, atol=5e-3)


def test_rows_are_scaled_apart() -> None:
    scales = 10.0 ** torch.arange(-12, 12)
    weight, x = torch.randn(24, 40) * scales[:, None], torch.randn(5, 40)
    relative = int8_linear(x, Int8Weight.of(weight)) / scales
    torch.testing.assert_close(relative, x @ weight.T / scales, rtol=0, atol=0.2)
    tall = x * 10.0 ** torch.arange(-10, 10, 4)[:, None]
    close = int8_linear(tall, Int8Weight.of(torch.eye(40))) / tall.abs().amax(1, keepdim=True)
    torch.testing.assert_close(close, tall / tall.abs().amax(1, keepdim=True), rtol=0, atol=1e-4)


def test_int8_weights_are_kept() -> None:
    weight = torch.randint(-127, 128, (40, 70)).float()
    weight[:, 0] = 127
    assert torch.equal(Int8Weight.of(weight).dense(), weight)


def test_zeros() -> None:
    packed = Int8Weight.of(torch.zeros(20, 30))
    assert torch.equal(int8_linear(torch.randn(2, 30), packed), torch.zeros(2, 20))
    assert torch.equal(int8_linear(torch.zeros(2, 30), packed), torch.zeros(2, 20))


def test_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match="num_in=30"):
        int8_linear(torch.randn(2, 20), Int8Weight.of(torch.zeros(20, 30)))

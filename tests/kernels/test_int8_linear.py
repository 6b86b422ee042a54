"""int8_linear: against dense products, with odd shapes, few and many inputs.

Seen to fail: a panel's last rows left out, the sum of the lower bytes not taken off, scales of
another panel, inputs of eight bits; with AMX the last bytes left out, the two
sums exchanged.
"""

from __future__ import annotations

import pytest
import torch
from specplus_kernels import Int8Weight, dispatch, int8_linear
from specplus_kernels.int8_linear import cpu


@pytest.fixture(autouse=True)
def needs_vnni(provider: str) -> None:
    if provider == "cpu" and not cpu.is_built():
        pytest.skip("the library was built on a CPU without AVX512-VNNI")


@pytest.mark.parametrize("num_rows", [0, 1, 3, 8, 9, 21])
@pytest.mark.parametrize(("num_out", "num_in"), [(1, 1), (15, 6), (16, 64), (100, 33), (700, 640)])
def test_is_the_dense_product(num_rows: int, num_out: int, num_in: int) -> None:
    x, weight = torch.randn(num_rows, num_in), torch.randn(num_out, num_in)
    packed = Int8Weight.of(weight)
    expected = x.double() @ packed.dense().double().T
    atol = 2e-4 * num_in**0.5  # six steps of 16-bit inputs, weights of unit size
    torch.testing.assert_close(int8_linear(x, packed).double(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inputs_of_16_bits_of_any_stride(dtype: torch.dtype) -> None:
    x = torch.randn(6, 100).to(dtype)[::2, :48]
    packed = Int8Weight.of(torch.randn(32, 48))
    expected = x.float() @ packed.dense().T
    torch.testing.assert_close(int8_linear(x, packed), expected, rtol=0, atol=1.4e-3)


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


@pytest.mark.parametrize("num_rows", [1, 9, 16, 21])
@pytest.mark.parametrize(("num_out", "num_in"), [(1, 1), (100, 33), (700, 640), (32, 196)])
def test_amx_gives_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, num_rows: int, num_out: int, num_in: int
) -> None:
    if not cpu.has_amx():
        pytest.skip("this CPU has no AMX, or the library was built without")
    x, packed = torch.randn(num_rows, num_in), Int8Weight.of(torch.randn(num_out, num_in))
    with dispatch.force("cpu"):
        tiled = int8_linear(x, packed)
        monkeypatch.setattr(cpu, "has_amx", lambda: False)
        assert torch.equal(int8_linear(x, packed), tiled)


def test_zeros() -> None:
    packed = Int8Weight.of(torch.zeros(20, 30))
    assert torch.equal(int8_linear(torch.randn(2, 30), packed), torch.zeros(2, 20))
    assert torch.equal(int8_linear(torch.zeros(2, 30), packed), torch.zeros(2, 20))


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite(odd: float) -> None:
    x, packed = torch.randn(3, 30), Int8Weight.of(torch.randn(20, 30))
    x[1, 7] = odd
    out = int8_linear(x, packed)
    assert not out[1].isfinite().any()
    assert torch.equal(out[::2], int8_linear(x[::2], packed))


def test_long_rows_run_the_reference(provider: str) -> None:
    packed = Int8Weight.of(torch.ones(1, 1 + (1 << 16)))
    if provider == "cpu":
        with pytest.raises(NotImplementedError, match="65537 columns"):
            int8_linear(torch.ones(1, packed.num_in), packed)
    longest = Int8Weight.of(torch.ones(1, 1 << 16))
    assert int8_linear(torch.ones(1, 1 << 16), longest).item() == pytest.approx(1 << 16, rel=1e-4)


def test_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match="num_in=30"):
        int8_linear(torch.randn(2, 20), Int8Weight.of(torch.zeros(20, 30)))

"""Compiles every served launch for sm_80, sm_90 and sm_100 and prints what the kernels take.

`python -m tests.kernels.compile_gate` (no GPU needed) exits with 1 when a kernel spills registers,
uses a stack or takes more shared memory than a block may have. `served/<op>.py` lists the launches.
`--quick`, which `make test` uses, takes all of them for sm_90 and each op's first for the others.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from itertools import product
from multiprocessing import get_context
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as every Triton until 3.9 has it

from tests.kernels.offline import Resources, compiling

CAPABILITIES = (80, 90, 100)
MAX_SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a block may have
OPS = sorted(path.stem for path in (Path(__file__).parent / "served").glob("[a-z]*.py"))


def compile_op(op: str, capability: int, quick: bool) -> list[tuple[str, Resources]]:
    """The kernels of the launches of one op, with the launch's name."""
    found = []
    launches = import_module(f"tests.kernels.served.{op}").LAUNCHES
    for name, launch in launches[: 1 if quick and capability != 90 else None]:
        with compiling(capability) as kernels:
            launch()
        assert kernels, f"{op}, {name}: no kernel was launched"
        found += [(name, kernel) for kernel in kernels]
    return found


def problems(kernel: Resources) -> list[str]:
    """What is wrong with a kernel; empty if nothing is."""
    found = []
    if kernel.local or kernel.stack:
        found.append(f"spills (stack {kernel.stack}, local {kernel.local} bytes)")
    if kernel.shared > MAX_SHARED[kernel.capability]:
        found.append(f"takes {kernel.shared} bytes of shared memory")
    return found


def rows(quick: bool) -> Iterator[tuple[str, Resources]]:
    """The launches' kernels on all capabilities; two compile at a time."""
    tasks = list(product(OPS, CAPABILITIES, [quick]))
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for found in pool.map(compile_op, *zip(*tasks, strict=True)):
            yield from found


def main() -> int:
    """Returns the exit status."""
    failed = 0
    print(f"{'kernel':34} {'launch':40} sm  warps regs stack local shared")
    for name, k in rows(quick="--quick" in sys.argv):
        wrong = problems(k)
        failed += bool(wrong)
        print(
            f"{k.kernel:34} {name:40} {k.capability:3} {k.num_warps:5} {k.registers:4} "
            f"{k.stack:5} {k.local:5} {k.shared:6} {'; '.join(wrong)}",
            flush=True,
        )
    print(f"{failed} kernels must be mended" if failed else "no spills")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())

"""Runs the GPU benchmark of every op: `python -m benchmarks.kernels`, or `make bench-gpu`.

With torch and Triton alone. Rows go to `benchmarks/results/`; what one op raises is printed and the
others run on. No op is started after BUDGET seconds. The exit status is 1 when an op failed or was
left out; `--only OP ...` runs the rest in a second call.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path

import torch

from benchmarks import harness

OPS = sorted(p.stem.removeprefix("bench_") for p in Path(__file__).parent.glob("bench_*.py"))
BUDGET = 480.0  # a machine is lent for commands of 10 minutes


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=OPS, default=OPS, metavar="OP")
    chosen = parser.parse_args().only
    if not torch.cuda.is_available():
        print("No GPU: run one op on the CPU with python -m benchmarks.kernels.bench_<op>.")
        return 1
    print(f"copy {harness.copy_bandwidth() / 1e12:.2f} TB/s, ", end="")
    print(f"bf16 matrix product {harness.matrix_rate() / 1e12:.0f} TFLOP/s")
    failed, begin = [], time.perf_counter()
    for op in chosen:
        run_gpu = getattr(import_module(f"{__package__}.bench_{op}"), "run_gpu", None)
        if run_gpu is None:
            continue
        start = time.perf_counter()
        if start - begin > BUDGET:
            failed.append(f"{op} (no time left)")
            continue
        try:
            harness.run_one(run_gpu, op, "cuda")
        except Exception:
            traceback.print_exc()
            failed.append(op)
        torch.cuda.empty_cache()
        print(f"{op}: {time.perf_counter() - start:.0f} s")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())

"""Times the implementations of one op side by side; a wrong one stops the run before any number.

A benchmark adds one case per size: our op, which runs under each of our providers, and its peers.
All are compared with our reference, then timed in turns, so that a slow spell of the machine hits
all of them; a peer that raises is named and left out. The quantiles go to the screen and to
`benchmarks/results/kernels_<op>.csv`.

On a GPU each call is timed between two events after a pass over a buffer larger than the L2 cache,
which also gives the host time to queue the launches. Where a case counts its bytes and operations,
the row carries their share of the copy bandwidth and of the bf16 matrix rate of the same run.
"""

from __future__ import annotations

import argparse
import csv
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from specplus_kernels import dispatch

from benchmarks import provenance

RESULTS = Path(__file__).parent / "results"
WARM_UP, MAX_ROUNDS = 5, 500  # per case and provider
CPU_SECONDS, GPU_SECONDS = 1.0, 0.1  # likewise
# Forty times the L2 cache of an H100; takes about 0.7 ms there, enough to queue some ten launches.
FLUSH_BYTES = 2 << 30
COPY_BYTES, MATRIX_SIZE = 1 << 30, 8192


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement; times in microseconds, shares between 0 and 1 (empty where not counted)."""

    op: str
    provider: str
    size: str
    p50_us: float
    p20_us: float
    p80_us: float
    num_bytes: int
    num_flops: int
    share_of_copy: float | str
    share_of_matmul: float | str
    device: str
    threads: int
    versions: str
    commit: str


Call = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Collects the rows of one op."""

    op: str
    device: str = "cpu"
    rows: list[Row] = field(default_factory=list)

    @property
    def our_providers(self) -> tuple[dispatch.Provider, ...]:
        """The kernel first: peers run beside it."""
        return ("triton" if self.device == "cuda" else "cpu", "reference")

    def case(
        self,
        size: str,
        ours: Call,
        peers: Mapping[str, Call] = MappingProxyType({}),
        *,
        result: Callable[[Call], Any] = lambda call: call(),
        before: Call = lambda: None,
        atol: float = 0.0,
        rtol: float = 0.0,
        num_bytes: int = 0,
        num_flops: int = 0,
    ) -> None:
        """Checks and times one size.

        Args:
            size: how the row names it.
            ours: runs our op.
            peers: the same question put to others.
            result: what a call computed, where it does not return it.
            before: runs untimed ahead of each call, e.g. to cool caches.
            atol: tolerance of the check.
            rtol: tolerance of the check.
            num_bytes: what the op must read and write at the least.
            num_flops: what the op must compute at the least, two for a multiply-add.

        """
        calls: dict[str, tuple[dispatch.Provider, Call]] = {}
        calls |= {which: (which, ours) for which in self.our_providers}
        calls |= {peer: (self.our_providers[0], call) for peer, call in peers.items()}
        with dispatch.force("reference"):
            expected = result(ours)
        for name, (which, call) in tuple(calls.items()):
            with dispatch.force(which):
                try:
                    found = result(call)
                except Exception as error:
                    if name not in peers:
                        raise
                    print(f"{self.op} {size}: {name} is left out, it raised {error!r}")
                    del calls[name]
                    continue
            torch.testing.assert_close(found, expected, atol=atol, rtol=rtol)
        for provider, times in _time_in_turns(calls, before, self.device).items():
            p20, p50, p80 = (round(times[int(len(times) * q)] * 1e6, 2) for q in (0.2, 0.5, 0.8))
            shares = self._shares(p50, num_bytes, num_flops)
            counts = (num_bytes, num_flops, *shares)
            row = Row(self.op, provider, size, p50, p20, p80, *counts, *_where(self.device))
            self.rows.append(row)
            shown = "".join(f"  {share:6.1%}" for share in shares if share != "")
            print(
                f"{self.op:18} {size:44} {provider:14} {p50:10.1f} us ({p20:.1f} .. {p80:.1f})"
                f"{shown}"
            )

    def _shares(
        self, p50_us: float, num_bytes: int, num_flops: int
    ) -> tuple[float | str, float | str]:
        """Of the copy bandwidth and of the matrix rate."""
        if self.device != "cuda":
            return "", ""
        seconds = p50_us * 1e-6
        return (
            round(num_bytes / seconds / copy_bandwidth(), 4) if num_bytes else "",
            round(num_flops / seconds / matrix_rate(), 4) if num_flops else "",
        )

    def save(self) -> None:
        """Replaces the op's rows of this device and thread count in its CSV file."""
        path = RESULTS / f"kernels_{self.op}.csv"
        kept = []
        if path.exists():
            here = (self.rows[0].device, str(self.rows[0].threads))
            with path.open() as old:
                kept = [r for r in csv.DictReader(old) if (r["device"], r["threads"]) != here]
        with path.open("w", newline="") as new:
            writer = csv.DictWriter(new, [f.name for f in fields(Row)], lineterminator="\n")
            writer.writeheader()
            writer.writerows([*kept, *map(asdict, self.rows)])


Run = Callable[[Benchmark], None]


def main(run: Run | None, op: str, doc: str | None, run_gpu: Run | None = None) -> None:
    """The command line of every bench_<op>.py: `run` without a GPU, `run_gpu` on one."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dry-run", action="store_true", help="leave benchmarks/results alone")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = run_gpu if device == "cuda" else run
    if chosen is None:
        parser.error(f"{op} has no benchmark for the {device} of this machine")
    torch.set_num_threads(options.threads)
    run_one(chosen, op, device, save=not options.dry_run)


def run_one(run: Run, op: str, device: str, save: bool = True) -> None:
    """Runs the benchmark of one op and keeps its rows."""
    torch.manual_seed(0)
    benchmark = Benchmark(op, device)
    run(benchmark)
    if save:
        benchmark.save()


def _time_in_turns(
    calls: Mapping[str, tuple[dispatch.Provider, Call]], before: Call, device: str
) -> dict[str, list[float]]:
    """Seconds of each call, sorted, without the warm-up."""
    time_one = _time_on_gpu if device == "cuda" else _time_on_cpu
    times: dict[str, list[float]] = {provider: [] for provider in calls}
    seconds = GPU_SECONDS if device == "cuda" else CPU_SECONDS
    deadline = time.perf_counter() + seconds * len(calls)
    rounds = 0
    while rounds < WARM_UP or (time.perf_counter() < deadline and rounds < MAX_ROUNDS):
        rounds += 1
        for provider, (which, call) in calls.items():
            with dispatch.force(which):
                before()
                times[provider].append(time_one(call))
    return {provider: sorted(values[WARM_UP - 1 :]) for provider, values in times.items()}


def _time_on_cpu(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _time_on_gpu(call: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _flush_buffer().zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


@functools.cache
def _flush_buffer() -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")


def _median_on_gpu(call: Call, rounds: int = 20) -> float:
    return sorted(_time_on_gpu(call) for _ in range(rounds))[rounds // 2]


@functools.cache
def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy within the GPU's memory."""
    source = torch.zeros(COPY_BYTES, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / _median_on_gpu(lambda: target.copy_(source))


@functools.cache
def matrix_rate() -> float:
    """Operations a second of a bf16 matrix product."""
    square = torch.randn(MATRIX_SIZE, MATRIX_SIZE, device="cuda", dtype=torch.bfloat16)
    return 2 * MATRIX_SIZE**3 / _median_on_gpu(lambda: square @ square)


@functools.cache
def _where(device: str) -> tuple[str, int, str, str]:
    """Device, threads, versions, commit."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        flags = "avx512" if torch.cpu._is_avx512_supported() else "no avx512"
        name = f"{provenance.cpu_name()} ({flags})"
    versions = ", ".join(f"{n} {v}" for n, v in provenance.package_versions().items())
    return name, torch.get_num_threads(), versions, provenance.commit()

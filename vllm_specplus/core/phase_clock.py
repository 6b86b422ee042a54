"""How long steps verify and draft, by the clock of the device that works."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from functools import wraps
from threading import Lock
from typing import Any

import torch

from vllm_specplus.core.stats import SpecStats


class PhaseClock:
    """Adds the time that steps take to verify and to draft, without waiting for a device."""

    def __init__(self, stats: SpecStats, device: torch.device) -> None:
        self._stats = stats
        self._mark: Callable[[], Any] = _HostMark if device.type == "cpu" else _device_mark
        self._step: tuple[bool, Any] | None = None
        self._steps: deque[tuple[bool, Any, Any, Any]] = deque()
        self._reading = Lock()

    def start(self, verifies: bool) -> None:
        """A step begins; `verifies` says whether it holds drafts."""
        self._step = verifies, self._mark()

    def watch(self, owner: Any, name: str) -> None:
        """Times the method `name` of `owner` inside steps; it ends them."""
        propose = getattr(owner, name)

        @wraps(propose)
        def timed(*args: Any, **kwargs: Any) -> Any:
            step, self._step = self._step, None
            if step is None:  # a dummy batch
                return propose(*args, **kwargs)
            verified = self._mark()
            drafts = propose(*args, **kwargs)
            self._steps.append((*step, verified, self._mark()))
            return drafts

        setattr(owner, name, timed)

    def read(self) -> None:
        """Adds up the steps that the device has finished."""
        with self._reading:  # vLLM waits for asynchronous outputs in a thread of its own
            while self._steps and self._steps[0][-1].query():
                verifies, began, verified, drafted = self._steps.popleft()
                self._stats.verify_seconds += verifies * began.elapsed_time(verified) / 1e3
                self._stats.draft_seconds += verified.elapsed_time(drafted) / 1e3


class _HostMark:
    """A moment of the host's clock, with the methods of a CUDA event."""

    def __init__(self) -> None:
        self._seconds = time.perf_counter()

    def query(self) -> bool:
        return True

    def elapsed_time(self, later: _HostMark) -> float:
        return 1e3 * (later._seconds - self._seconds)


def _device_mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event

"""Engines in processes of their own: start, drive over a pipe, and end without a trace.

One process per method keeps whatever a method changes in vLLM (patches, registered backends,
global metrics) away from the others; only one of them works at a time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from benchmarks.e2e.engine import Engine, EngineSettings
from benchmarks.e2e.environment import worker_environment
from benchmarks.e2e.methods import Method
from benchmarks.provenance import ROOT

EXIT_SECONDS = 5
LOG_TAIL_LINES = 25


class EngineError(RuntimeError):
    """An engine's process failed or died; the text carries the end of its log."""


class EngineProcess:
    """Handle of one engine: `call(name, ...)` runs that method of `Engine` in its process.

    The process has a session of its own, so Ctrl-C reaches the parent alone, which ends it.
    """

    def __init__(self, method: Method, settings: EngineSettings, log_path: Path) -> None:
        self.method = method
        self._log_path = log_path
        self._connection, child = Pipe()
        with log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.e2e.process", str(child.fileno())],
                cwd=ROOT,
                env=os.environ | worker_environment(method.uses_plugin),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[child.fileno()],
                start_new_session=True,
            )
        child.close()
        self._connection.send((method, settings))

    def result(self) -> Any:
        """Wait until the engine has started, or for the answer to the last call; EngineError if
        that failed."""
        try:
            ok, value = self._connection.recv()
        except (EOFError, ConnectionResetError):
            ok, value = False, f"its process ended with code {self._process.wait()}"
        if not ok:
            log = self._log_path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
            raise EngineError("\n".join([f"engine {self.method.label}: {value}", *log]))
        return value

    def call(self, name: str, *args: Any) -> Any:
        """Run `Engine.<name>(*args)` and wait for its value."""
        self._connection.send((name, args))
        return self.result()

    def leave(self) -> None:
        """Close the pipe, which ends an idle engine."""
        self._connection.close()

    def end(self, deadline: float) -> None:
        """Let the process leave until `deadline` (`time.monotonic`), then kill it."""
        try:
            self._process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        finally:
            self._process.kill()
            self._process.wait()


@contextmanager
def running_engines(
    methods: Sequence[Method],
    settings: EngineSettings,
    on_ready: Callable[[Method, float], None] = lambda method, seconds: None,
) -> Iterator[dict[str, EngineProcess]]:
    """All engines by label; they end with the context.

    They start one after the other, as ours measure what rows cost on this machine when they start.
    """
    engines: dict[str, EngineProcess] = {}
    with tempfile.TemporaryDirectory(prefix="specplus-bench-") as log_folder:
        try:
            for number, method in enumerate(methods):
                began = time.perf_counter()
                log_path = Path(log_folder) / f"{number}.log"
                engines[method.label] = EngineProcess(method, settings, log_path)
                engines[method.label].result()
                on_ready(method, time.perf_counter() - began)
            yield engines
        finally:
            for engine in engines.values():
                engine.leave()
            deadline = time.monotonic() + EXIT_SECONDS
            for engine in engines.values():
                engine.end(deadline)


def _serve(connection: Connection) -> None:
    """The engine's process: build it, say so, then answer calls until the pipe closes."""
    method, settings = connection.recv()
    engine: Engine | None = None
    while True:
        try:
            if engine is None:
                engine, value = Engine(method, settings), None
            else:
                name, args = connection.recv()
                value = getattr(engine, name)(*args)
        except EOFError:
            return
        except Exception as error:
            traceback.print_exc()
            connection.send((False, f"{type(error).__name__}: {error}"))
            if engine is None:
                return
        else:
            connection.send((True, value))


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))

"""OpenMP reads its environment once, when torch loads; threads of several processes that wait for
each other on the same cores slow all down. Seen to fail: torch imported before conftest.py sets it.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch


def test_torch_has_one_thread() -> None:
    assert torch.get_num_threads() == 1


@pytest.mark.skipif(os.cpu_count() == 1, reason="one core has one thread by itself")
def test_torch_has_one_thread_where_the_environment_says_nothing() -> None:
    # A process that had an engine of vLLM says LD_PRELOAD: OpenMP is there before conftest.py.
    said = ("OMP_NUM_THREADS", "LD_PRELOAD")
    environ = {name: value for name, value in os.environ.items() if name not in said}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    command += ["-k", test_torch_has_one_thread.__name__ + " and not environment"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout

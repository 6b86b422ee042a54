"""What the tests of options and of patches share."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.configs import LLAMA, write_config
from vllm_specplus.startup import patches


@pytest.fixture
def only_the_options_patched() -> Any:
    patches.undo()
    patches.apply("options")
    yield
    patches.undo()
    patches.apply("options")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_config(tmp_path_factory.mktemp("llama"), LLAMA)

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.train.tiny import corpus_of, load_teacher, on_itself, save_target, write_samples
from vllm_specplus.train.corpus import Corpus
from vllm_specplus.train.teacher import Teacher


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices on a busy machine: a second thread costs more than it gives."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", params=["llama", "sliding"])
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    folder = tmp_path_factory.mktemp(request.param)
    return load_teacher(save_target(folder, request.param))


@pytest.fixture(scope="session")
def corpus(teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Eight samples of 40 tokens, trained on and held out."""
    folder = tmp_path_factory.mktemp("corpus")
    return corpus_of(on_itself(write_samples(teacher, num=8, length=40)), teacher, folder)

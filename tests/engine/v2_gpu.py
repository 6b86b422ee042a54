"""What a GPU runs and a CPU can: vLLM's Triton attention, and CUDA graphs' way with memory.

`python -m tests.engine.v2_gpu gpu`. FlashAttention and FlashInfer have no kernels for CPUs; that
their caches are laid out as Triton's was read, and no test compares it. A captured graph reads at
every replay the memory that it was captured with, so here a step's forward pass is given the
metadata that was built at capture, and all that the step itself staged is in that memory or is not
seen.
"""

from __future__ import annotations

import tests.engine.interpreter  # noqa: F401  (before vLLM)

# isort: split
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.gpu.cudagraph_utils import prepare_inputs_to_capture

from tests.engine import v2
from tests.engine.engines import Engine
from vllm_specplus.engine.v2 import TreeModelState


@contextmanager
def triton_attention() -> Iterator[None]:
    """Engines that start inside use vLLM's Triton backend, ours among them with tree rows."""

    def path(*_: Any, **__: Any) -> str:
        return AttentionBackendEnum.TRITON_ATTN.get_path()

    with (
        mock.patch.object(CpuPlatform, "get_attn_backend_cls", path),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
    ):
        yield


def on_triton_attention(feature: str, model: str, **options: Any) -> None:
    wanted = v2.asked(feature, 3, max_tokens=10)
    options["max_num_seqs"] = 7  # an engine of its own
    plain = v2.plain_run(model, wanted)
    with triton_attention():
        trees = v2.engine(model, "oracle", tuple(options.items()))
        layer = next(iter(_runner(trees).compilation_config.static_forward_context.values()))
        assert layer.attn_backend.get_name() == "TRITON_ATTN"
        moved = v2.MOVED.moved
        v2.assert_equal(trees.run(wanted), plain)
        assert v2.MOVED.moved > moved


def _runner(engine: Engine) -> Any:
    return engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner


def replayed(feature: str, **options: Any) -> None:
    """Steps of nothing but trees see what was there at capture."""
    wanted = v2.asked(feature, 4, max_tokens=24)
    plain = v2.plain_run("llama", wanted)
    options["max_num_seqs"] = 5
    trees = v2.engine("llama", "oracle", tuple(options.items()))
    runner, rows = _runner(trees), 1 + v2.NUM_NODES
    captured = {
        num_reqs: prepare_inputs_to_capture(
            num_reqs,
            num_reqs * rows,
            runner.model_state,
            runner.input_buffers,
            runner.block_tables,
            runner.attn_groups,
            runner.kv_cache_config,
            full_cudagraph=True,
            max_query_len=rows,
        )[0]
        for num_reqs in range(1, 6)
    }
    replays, prepare_attn = 0, TreeModelState.prepare_attn

    def replay(state: Any, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal replays
        metadata = prepare_attn(state, input_batch, *args, **kwargs)
        if (input_batch.num_scheduled_tokens != rows).any():
            return metadata
        replays += 1
        return captured[input_batch.num_reqs]

    with mock.patch.object(TreeModelState, "prepare_attn", replay):
        moved = v2.MOVED.moved
        v2.assert_equal(trees.run(wanted), plain)
    assert replays > 5 and v2.MOVED.moved > moved


def not_replayed() -> None:
    """Taken out: the memory that lasts. The text must change."""
    where = TreeModelState._stage

    def elsewhere(state: Any, input_batch: Any) -> None:
        state._ancestor_mask = state._ancestor_mask.clone()
        where(state, input_batch)

    try:
        with mock.patch.object(TreeModelState, "_stage", elsewhere):
            replayed("greedy")
    except AssertionError:
        return
    raise AssertionError("the text did not change")


SCENARIOS = {
    "gpu: triton attention": lambda: on_triton_attention("greedy", "llama"),
    "gpu: triton attention, sliding window, seed": lambda: on_triton_attention("seed", "sliding"),
    "gpu: graph replay": lambda: replayed("greedy"),
    "gpu: graph replay, seed": lambda: replayed("seed"),
    "gpu: graph replay, control": not_replayed,
}

if __name__ == "__main__":
    v2.main(SCENARIOS)

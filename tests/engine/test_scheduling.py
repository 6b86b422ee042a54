"""What the scheduler does with requests in flight does not change their text."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.engine.engines import ALL_METHODS, TREE_METHODS, Request, get_engine, reference, start
from tests.engine.features import assert_equal, differ, params, prompts, requests


def count_calls(monkeypatch, owner, name):
    """A list that grows by the arguments of every call of `owner.name`."""
    calls, original = [], getattr(owner, name)

    def counted(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


@pytest.mark.parametrize("method", ALL_METHODS)
@pytest.mark.parametrize("model", ["llama", pytest.param("sliding", marks=pytest.mark.slow)])
def test_requests_arrive_while_others_run(model, method):
    asked = [replace(r, arrival=2 * i) for i, r in enumerate(requests("greedy", 8))]
    assert_equal(get_engine(model, method).run(asked), reference(model, asked))


@pytest.mark.parametrize("method", TREE_METHODS)
@pytest.mark.parametrize("model", ["llama", pytest.param("sliding", marks=pytest.mark.slow)])
def test_prompt_chunks_share_steps_with_trees(model, method, monkeypatch):
    asked = [
        Request(prompt, params("greedy"), arrival=3 * index)
        for index, prompt in enumerate(prompts(6, longest=300, seed=4))
    ]
    plain = reference(model, asked)
    engine = get_engine(model, method, max_num_batched_tokens=48, max_num_seqs=8)
    steps = count_calls(monkeypatch, engine.scheduler, "update_from_output")
    assert_equal(engine.run(asked), plain)
    scheduled = [step[0] for step in steps]
    assert any(
        step.scheduled_spec_decode_tokens
        and max(step.num_scheduled_tokens.values()) > 1 + engine.max_nodes
        for step in scheduled
    ), "no step held a tree and a prompt chunk"


@pytest.mark.parametrize("method", TREE_METHODS)
@pytest.mark.parametrize("model", ["llama", pytest.param("sliding", marks=pytest.mark.slow)])
def test_blocks_written_by_trees_serve_the_prefix_cache(model, method):
    first = requests("greedy", 4, max_tokens=120, ignore_eos=True)
    engine = get_engine(model, method, prefix_cache_retention_interval=None)
    outputs = engine.run(first)
    assert_equal(outputs, reference(model, first))
    second = [
        Request([*request.prompt, *output.outputs[0].token_ids, 300 + index], request.params)
        for index, (request, output) in enumerate(zip(first, outputs, strict=True))
    ]
    plain = reference(model, second)
    outputs = engine.run(second, keep_cache=True)
    assert_equal(outputs, plain)
    for request, output in zip(first, outputs, strict=True):
        assert output.num_cached_tokens > len(request.prompt) + 32, "no generated block was reused"


@pytest.mark.parametrize("method", TREE_METHODS)
@pytest.mark.parametrize(
    ("model", "num_blocks"), [("llama", 20), pytest.param("sliding", 40, marks=pytest.mark.slow)]
)
def test_preempted_requests_resume(model, num_blocks, method, monkeypatch):
    asked = requests("greedy", 8, max_tokens=120, ignore_eos=True)
    seeded = requests("seed", 2, max_tokens=120, ignore_eos=True)
    plain = reference(model, [*asked, *seeded])
    engine = get_engine(model, method, num_gpu_blocks_override=num_blocks, max_model_len=256)
    preempted = count_calls(monkeypatch, engine.scheduler, "_preempt_request")
    assert_equal(engine.run([*asked, *seeded]), plain)
    assert preempted


def test_preemption_does_not_change_unseeded_text(monkeypatch):
    asked = [Request(p, params("seed", seed=None, max_tokens=120)) for p in prompts(8)]
    roomy, narrow = (
        start("llama", "dynamic", max_model_len=256, num_gpu_blocks_override=blocks)
        for blocks in (512, 20)
    )
    preempted = count_calls(monkeypatch, narrow.scheduler, "_preempt_request")
    assert not differ(roomy.run(asked), narrow.run(asked))
    assert preempted


@pytest.mark.parametrize("method", TREE_METHODS)
@pytest.mark.parametrize("model", ["llama", pytest.param("sliding", marks=pytest.mark.slow)])
def test_aborted_requests_leave_the_others_alone(model, method):
    asked = requests("greedy", 8)
    plain = reference(model, asked)
    aborted = {1: 4, 3: 5, 6: 6}
    run = [replace(r, abort_at=aborted.get(i)) for i, r in enumerate(asked)]
    outputs = get_engine(model, method).run(run)
    kept = [i for i in range(len(asked)) if i not in aborted]
    assert_equal([outputs[i] for i in kept], [plain[i] for i in kept])
    for i in aborted:
        part, whole = (o.outputs[0].token_ids for o in (outputs[i], plain[i]))
        assert 0 < len(part) < len(whole) and list(part) == list(whole)[: len(part)]


@pytest.mark.parametrize("method", ALL_METHODS)
@pytest.mark.parametrize("model", ["llama", pytest.param("sliding", marks=pytest.mark.slow)])
def test_requests_run_to_the_longest_length(model, method):
    asked = requests("greedy", 6, max_tokens=None, ignore_eos=True)
    asked += [Request([300] * n, params("greedy", max_tokens=None)) for n in (126, 127)]
    plain = reference(model, asked, max_model_len=128)
    engine = get_engine(model, method, max_model_len=128)
    assert_equal(engine.run(asked), plain)
    lengths = [
        len(r.prompt) + len(o.outputs[0].token_ids) for r, o in zip(asked, plain, strict=True)
    ]
    assert max(lengths) == 128
    assert engine.extra_tokens > 0


@pytest.mark.parametrize("method", ["plain", "dynamic", "oracle"])
def test_same_engine_seed_same_text(method):
    asked = [Request(prompt, params("seed", seed=None)) for prompt in prompts(6)]
    first, second, other = (start("llama", method, seed=seed).run(asked) for seed in (5, 5, 6))
    assert not differ(first, second)
    assert differ(first, other)

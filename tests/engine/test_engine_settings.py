"""Settings of the whole engine under which trees must still give plain text.

Seen to fail: `_RootRows` left out of the row metadata (the budget never bites), the logprobs mode
of another engine, AMX's cache layout left selected (the process dies of an illegal instruction
where AMX is missing), in bfloat16 read as another, or its accepted rows not moved.
"""

from __future__ import annotations

from typing import Any

import pytest
from vllm.config.reasoning import ReasoningConfig
from vllm.v1.attention.backends import cpu_attn

from tests.engine.engines import Request, get_engine, reference, start
from tests.engine.features import (
    LOGPROB_TOLERANCE,
    assert_equal,
    facts,
    logprob_rows,
    params,
    prompts,
    requests,
)
from tests.engine.models import VOCAB_SIZE, build_tokenizer

LOGPROBS = dict(logprobs=3, temperature=0.7, top_k=20)
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "processed_logprobs": (dict(logprobs_mode="processed_logprobs"), LOGPROBS),
    "processed_logits": (dict(logprobs_mode="processed_logits"), LOGPROBS),
    "raw_logits": (dict(logprobs_mode="raw_logits"), LOGPROBS),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_logprobs(setting):
    engine_options, request_options = SETTINGS[setting]
    asked = requests("greedy", 4, **request_options)
    plain = reference("llama", asked, **engine_options)
    engine = get_engine("llama", "oracle", **engine_options)
    assert_equal(engine.run(asked), plain)
    assert engine.extra_tokens > 0


def test_logprobs_of_the_whole_vocabulary():
    """By token: near-ties may swap their ranks."""
    asked = requests("greedy", 3, logprobs=-1)
    plain = reference("llama", asked, max_logprobs=-1)
    engine = get_engine("llama", "oracle", max_logprobs=-1)
    ours = engine.run(asked)
    assert engine.extra_tokens > 0
    for a, b in zip(ours, plain, strict=True):
        assert facts(a) == facts(b)
        for row_a, row_b in zip(logprob_rows(a), logprob_rows(b), strict=True):
            assert len(row_a) == VOCAB_SIZE
            found, wanted = ({token: lp for token, _, lp in row} for row in (row_a, row_b))
            assert found == pytest.approx(wanted, abs=LOGPROB_TOLERANCE)


@pytest.mark.parametrize("method", ["dynamic", "oracle"])
def test_thinking_budget(method):
    """Requests that think, and others beside them that are drafted for."""
    think, end = (build_tokenizer().encode(f" {word}")[0] for word in ("them", "water"))
    config = ReasoningConfig(reasoning_start_str=" them", reasoning_end_str=" water")
    budget = dict(thinking_token_budget=6)
    asked = [
        Request([*prompt, think], params(feature, index, **(budget if index % 2 else {})))
        for feature in ("greedy", "seed")
        for index, prompt in enumerate(prompts(4))
    ]
    learnt = reference("llama", [r for r in asked if r.params.thinking_token_budget is None])
    plain = start("llama", "plain", reasoning_config=config).run(asked)
    forced = [o.outputs[0].token_ids[6] == end for o in plain]
    assert all(forced[1::2]) and len(learnt) == 4, "the budget must bite"
    engine = start("llama", method, reasoning_config=config)
    assert_equal(engine.run(asked), plain)
    assert engine.extra_tokens > 0


def test_other_cache_layouts_become_vec(monkeypatch):
    """Such as a packed one for a model in float32, which tree attention does not read."""
    asked = requests("greedy", 4)
    plain = reference("llama", asked)
    monkeypatch.setattr(cpu_attn, "_get_attn_isa", lambda *_, **__: "amx")
    engine = start("llama", "oracle")
    assert_equal(engine.run(asked), plain)
    assert engine.extra_tokens > 0


BF16_TOLERANCE = 0.05
"""Of log-probabilities near -1 to -3, whose logits have 8 bits; those of wrong keys are 0.1 off."""


def test_text_in_bfloat16():
    """Plain text up to a near-tie, and its log-probabilities: where the CPU has AMX, trees read and
    move the cache in its layout."""
    asked = requests("greedy", 8, logprobs=2)
    plain = reference("llama", asked, dtype="bfloat16")
    engine = start("llama", "oracle", dtype="bfloat16")
    num_equal = 0
    for ours, theirs in zip(engine.run(asked), plain, strict=True):
        [ours, theirs] = [output.outputs[0] for output in (ours, theirs)]
        for position, token in enumerate(ours.token_ids):
            expected = theirs.logprobs[position]
            assert token in expected
            gap = ours.logprobs[position][token].logprob - expected[token].logprob
            assert abs(gap) < BF16_TOLERANCE
            if token != theirs.token_ids[position]:
                best, second = sorted((each.logprob for each in expected.values()), reverse=True)
                assert best - second < BF16_TOLERANCE
                break
            num_equal += 1
    assert num_equal > 100 and engine.extra_tokens > 50

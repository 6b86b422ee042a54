"""The counters agree with each other, with vLLM's own and with the text, on the V1 engine.

tests/engine/v2.py has the same for V2, test_processes.py for engines in processes of their own and
test_serve.py for `/metrics`.

Seen to fail: prompt chunks counted as rounds; counters sent whole instead of what is new; two lines
at two shutdowns; counters of an earlier engine left registered; a wrong reason; requests at their
end counted as not paying. In tests/engine/v2.py: preempted requests counted again.
"""

from __future__ import annotations

import logging
from math import inf
from unittest import mock

import numpy as np
import pytest

from tests.engine.engines import Engine, Request, get_engine, start
from tests.engine.features import params, prompts, requests
from tests.engine.metrics import LOGGED, check, gather
from vllm_specplus.config import SpecPlusConfig
from vllm_specplus.core.stats import FALLBACKS
from vllm_specplus.proposers.base import DraftRequest
from vllm_specplus.round import SpecRound


def emitted(engine: Engine, asked: list[Request]) -> int:
    return sum(len(output.outputs[0].token_ids) for output in engine.run(asked))


@pytest.mark.parametrize("method", ["static", "dynamic", "oracle"])
def test_counters_agree(method):
    """Prompts come in chunks, which emit nothing and are no rounds."""
    engine = start("llama", method, disable_log_stats=False, max_num_batched_tokens=48)
    asked = requests("greedy", 5, ignore_eos=True) + requests("seed", 3, ignore_eos=True)
    num_tokens = 0
    for part in (asked, asked[:3]):
        num_tokens += emitted(engine, part)
        stats = check(gather(engine.llm))
        assert stats.num_rounds + stats.num_accepted_tokens == num_tokens
    assert dict.fromkeys(FALLBACKS, 0) == stats.fallbacks


def test_the_last_engine_owns_the_names():
    for num_tokens in (7, 5):
        engine = start("llama", "dynamic", disable_log_stats=False)
        assert emitted(engine, requests("one_token", num_tokens)) == num_tokens
        counted = gather(engine.llm)["metrics"]
        assert counted["vllm_specplus:num_rounds"] == num_tokens


def test_fallbacks_are_counted_once_per_request():
    """Penalties and bad words are none on V1: they are exact on its trees."""
    engine = start("llama", "oracle")
    asked = [r for f in ("json", "penalties_seed", "bad_words", "regex") for r in requests(f, 2)]
    engine.run(asked)
    ((stats,)) = engine.llm.collective_rpc("specplus_stats")
    assert stats["fallbacks"] == dict.fromkeys(FALLBACKS, 0) | {"structured_outputs": 4}


def test_rounds_that_do_not_pay_are_counted():
    """Only of requests that could draft: not of those at their end."""
    options = dict(speculative_model="[ngram]", num_speculative_tokens=4, tree="dynamic:4")
    spec_round = SpecRound(SpecPlusConfig.model_validate(options))
    repeats = np.array([5, 6, 7] * 8)

    def propose() -> list[int]:
        asked = [DraftRequest(str(i), repeats, max_depth=i, max_nodes=4) for i in range(3)]
        return [len(tree) for tree in spec_round.propose(asked)]

    spec_round.budget.measured({1: 1.0, 8: 1.01})
    assert propose() == [0, 1, 2] and spec_round.stats.fallbacks["does_not_pay"] == 0
    spec_round.budget.measured({1: 1.0, 8: 100.0})
    assert propose() == [0, 0, 0] and spec_round.stats.fallbacks["does_not_pay"] == 2


def test_a_proposer_hears_what_was_granted():
    """The first nodes of what it proposed, of the requests that it was asked about alone."""
    options = dict(speculative_model="[ngram]", num_speculative_tokens=4, tree="dynamic:4")
    spec_round = SpecRound(SpecPlusConfig.model_validate(options))
    spec_round.budget.measured({1: 1.0, 5: 1.01, 6: 100.0})
    repeats = np.array([5, 6, 7] * 8)
    with mock.patch.object(spec_round.proposer, "granted") as granted:
        depths = enumerate((4, 0, 4))
        asked = [DraftRequest(str(i), repeats, max_depth=n, max_nodes=4) for i, n in depths]
        trees = spec_round.propose(asked)
    (heard,) = granted.call_args.args
    assert [tuple(c.tokens) for c in heard] == [tuple(trees[i].tokens) for i in (0, 2)]
    assert sum(map(len, trees)) == 2 and not trees[1].tokens


def test_where_ranks_are_counted_every_draft_has_its_row():
    """Levels have no limit either: tokens of any worth open them (test_level_gate.py)."""
    options = dict(speculative_model="[ngram]", num_speculative_tokens=4, tree="dynamic:4")
    spec_round = SpecRound(SpecPlusConfig.model_validate(options))
    spec_round.budget.measured({1: 1.0, 8: 100.0})
    asked = DraftRequest("0", np.array([5, 6, 7] * 8), max_depth=4, max_nodes=4)
    assert not len(*spec_round.propose([asked], row_ms=5.0))
    spec_round.count_ranks()
    with mock.patch.object(spec_round.proposer, "propose", wraps=spec_round.proposer.propose) as of:
        assert len(*spec_round.propose([asked], row_ms=5.0)) == 4
    assert of.call_args.args[0][0].token_ms == inf


def test_one_line_is_logged_at_shutdown(caplog):
    engine = start("llama", "dynamic")
    engine.run([Request(p, params("greedy", ignore_eos=True)) for p in prompts(3)])
    ((stats,)) = engine.llm.collective_rpc("specplus_stats")
    with caplog.at_level(logging.INFO, "vllm.specplus"):
        engine.llm.collective_rpc("shutdown")
        engine.llm.collective_rpc("shutdown")
    (line,) = (message for message in caplog.messages if message.startswith(LOGGED))
    assert line.startswith(f"{LOGGED}{stats['num_rounds']} rounds, {stats['num_drafts']} with")


@pytest.mark.slow
def test_vllms_own_methods_have_no_counters_of_ours():
    engine = get_engine("llama", "native", disable_log_stats=False)
    engine.run(requests("greedy", 2))
    assert engine.llm.get_metrics()
    assert not hasattr(engine.llm.llm_engine.logger_manager, "specplus")

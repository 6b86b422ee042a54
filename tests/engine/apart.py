"""Runs one engine in a process of its own: a job as JSON on stdin, what came out on stdout.

job: model, method, options of the engine, and `truth`, pairs of prompt and output for the oracle.
The requests are `features.mixed()`. What vLLM logs about its end comes after the result.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from vllm import LLM

from tests.engine.engines import DEFAULTS, spec_options
from tests.engine.features import facts, mixed
from tests.engine.metrics import gather
from tests.engine.proposers import learn, truth, watch

RESULT = "RESULT "
"""Starts the line of standard output that holds the result; engines print there too."""


def counts(worker: Any) -> dict[str, int]:
    probe = worker.worker.model_runner.probe
    return {"accepted": probe.accepted, "moved": probe.moved}


def install(worker: Any, known: dict) -> None:
    worker.worker.model_runner.probe = watch(worker, known)


def main() -> None:
    job = json.load(sys.stdin)
    for prompt, output in job["truth"]:
        learn(prompt, output)
    llm = LLM(job["path"], **DEFAULTS | spec_options(job["method"]) | job["options"])
    llm.collective_rpc(install, args=(truth(),))
    asked = mixed()
    outputs = llm.generate(
        [{"prompt_token_ids": list(request.prompt)} for request in asked],
        [request.params for request in asked],
        use_tqdm=False,
    )
    result = {
        "facts": [facts(output) for output in outputs],
        "workers": llm.collective_rpc(counts),
        "counted": gather(llm),
    }
    print("\n" + RESULT + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()

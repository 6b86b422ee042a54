"""End-to-end benchmark: the same prompts through several drafting methods, interleaved.

`generate` is the benchmark, `demo` a short fixed run of it. Both go `methods` and `prompts` ->
`process` (one vLLM engine per method, each in its own process) -> `measure` (rounds) ->
`summary` and `equality` (numbers) -> `report` and `plots` (table, JSON, PNG).
"""

"""The engines that run token trees: the round and its hooks in vLLM's V1 and V2 runners."""

"""Where vLLM is touched: options, patches, refusals, and the engines that run token trees."""

"""Token trees, how they grow and how they are verified: pure torch and Python, no vLLM."""

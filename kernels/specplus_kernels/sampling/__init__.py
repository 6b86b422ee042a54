"""What the verification ops share: the keyed noise, the batch of token trees, its result."""

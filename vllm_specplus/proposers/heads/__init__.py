"""Trained heads: their checkpoints and their torch modules."""

"""What one call on a GPU machine runs: `benchmarks/gpu/run.sh`; README.md says how."""

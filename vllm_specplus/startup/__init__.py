"""What happens before an engine runs: options, checks of the installed vLLM, patches, refusals."""

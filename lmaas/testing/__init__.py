"""A fake engine for tests and benchmarks, which speaks vLLM's HTTP without a model."""

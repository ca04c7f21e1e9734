"""What stands in for the real thing in tests and benchmarks: a fake engine that speaks vLLM's HTTP."""

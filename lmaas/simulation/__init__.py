"""What a trace of requests would cost: the real policies on a virtual clock, over a model of the engine with measured times."""

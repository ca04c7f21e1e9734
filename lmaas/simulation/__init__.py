"""Simulates the cost of a trace of requests: the real policies on a virtual clock, over a model of the engines."""

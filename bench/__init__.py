"""Benchmarks: the claims of lmaas about speed and cost, measured side by side with other software (`make bench`)."""

"""Admission: which limits hold for a request, what it may use at most, and how a refusal is told. The counting is in Redis."""

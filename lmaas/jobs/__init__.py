"""Durable work: the processes of `lmaas jobs`, their leases, and what they run."""

"""Clients' own libraries, unmodified, against a gateway: each gets a base URL and a key, and nothing else."""

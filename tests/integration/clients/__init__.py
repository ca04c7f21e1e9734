"""Clients' own libraries, unmodified, against a gateway: each gets only a base URL and a key."""

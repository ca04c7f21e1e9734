"""The gateway over HTTP: its server, keys, idempotency, and the endpoints of the protocols."""

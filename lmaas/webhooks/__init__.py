"""Sending events to webhooks: which targets are allowed, signatures, and when an attempt is repeated. What is sent is in `store`."""

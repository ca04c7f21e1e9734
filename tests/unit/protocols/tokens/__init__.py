"""The endpoints that report tokens."""

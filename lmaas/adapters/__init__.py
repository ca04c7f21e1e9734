"""Adapters: upload, validation without executing anything, immutable versions, and the store of their files."""

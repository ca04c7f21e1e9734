"""Adapters: upload, validation without executing anything, immutable versions, and storage of their files."""

"""The OpenAI API for tenants: from an HTTP request to an engine's tokens. `pipeline.py` shows the whole path."""

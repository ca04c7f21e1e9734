"""Engines: launching vLLM servers, their HTTP client, and the parts of lmaas that run inside their processes."""

"""Traces of requests: their ids, their spans, and how those are sent to a collector. Only export.py imports OpenTelemetry."""

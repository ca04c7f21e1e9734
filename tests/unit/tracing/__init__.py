"""Traces without servers."""

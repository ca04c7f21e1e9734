"""Tests without a server, an engine or a library of the engine. All of them together take about a minute (README.md)."""

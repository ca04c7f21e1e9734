"""The supervisor of one engine: starts, probes, drains and stops it, loads and unloads adapters, and sends heartbeats."""

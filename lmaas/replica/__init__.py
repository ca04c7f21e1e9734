"""The supervisor beside one engine: start, probe, load and unload adapters, heartbeat, drain, stop."""

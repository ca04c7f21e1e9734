"""Tests with a real Postgres and a real Valkey, and with fakes for engines (README.md)."""

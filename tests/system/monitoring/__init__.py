"""Prometheus from Debian: alert rules, and the queries of dashboards on what a service really shows."""

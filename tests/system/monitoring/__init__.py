"""Prometheus from Debian: alert rules, and the queries of dashboards on the metrics of a service."""

"""Tenants and base models as code: reading manifests, planning the changes that they need, and applying them through the API."""

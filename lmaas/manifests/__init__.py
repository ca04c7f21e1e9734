"""Tenants and base models as code: reading manifests, planning the changes that they ask for, and applying them through the API."""

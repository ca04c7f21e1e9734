"""Tenants and base models as code: manifests, and the API client that makes the service match them."""

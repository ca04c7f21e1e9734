"""Tenants as code: manifests (`tenants/*.yaml`) and the API client that makes the service match them."""

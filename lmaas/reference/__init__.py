"""The API reference for people at `/docs`: HTML pages that are made from the OpenAPI document, and nothing else."""

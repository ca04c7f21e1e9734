"""The types of the bodies, queries and answers of the management API: validation, the OpenAPI schemas and the documentation follow from
them."""

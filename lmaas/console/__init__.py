"""The web console: pages for tenants and operators, which call the management API with the credentials of a session."""

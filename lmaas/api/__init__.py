"""The management API: a table of operations for tenants (`/v1/adapters`, `/v1/keys`, `/v1/usage`) and operators (`/admin/v1`), and the
routes, handlers and OpenAPI document that follow from it."""

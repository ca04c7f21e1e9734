"""The tenant API (`/v1/adapters`, `/v1/keys`, `/v1/usage`) and the operator API (`/admin/v1`), with their OpenAPI document."""

"""`lmaas up` runs the whole service on one machine, with embedded Postgres and Valkey; `lmaas init` prepares a service elsewhere."""

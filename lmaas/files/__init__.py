"""Files of tenants: their bytes in the object store, and their rows."""

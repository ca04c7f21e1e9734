"""Files of tenants: their rows, and their bytes in the object store."""

"""Who runs next, and where: tickets, leases and replica slots, decided atomically inside Redis (or Valkey)."""

"""The scheduler: tickets, leases and replica slots. Which request runs next, and where, is decided atomically inside Redis (or Valkey)."""

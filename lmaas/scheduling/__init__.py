"""The scheduler: tickets, leases, slots and limits, decided by atomic functions inside Redis (or Valkey), and their client."""

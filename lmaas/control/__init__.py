"""The controller: decides how many replicas each pool has, starts and stops them, and writes the ledger. Decisions are pure functions."""

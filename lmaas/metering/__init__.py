"""Usage: what each request used, written to the ledger exactly once."""

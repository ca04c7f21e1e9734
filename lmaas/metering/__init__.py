"""Metering: usage events and the ledger, prices and charges, engine time and its allocation to tenants."""

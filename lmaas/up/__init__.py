"""`lmaas up`: the whole service on one machine, with embedded Postgres and Valkey."""

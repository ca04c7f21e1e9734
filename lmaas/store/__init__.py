"""Postgres, the truth. The only user of SQLAlchemy: tables here, queries by domain beside them."""

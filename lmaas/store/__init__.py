"""Access to Postgres: the tables, and queries by domain. The only user of SQLAlchemy."""

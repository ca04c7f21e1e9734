"""Limits of tenants and of keys."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

LIMITS = ("requests_per_minute", "tokens_per_minute", "max_concurrent", "tokens_per_month", "budget_per_month")


def upgrade() -> None:
    # In the order in which keys are looked up, which locks both: the other way round would be a deadlock.
    for table in ("api_keys", "tenants"):
        for name in LIMITS:
            op.add_column(table, sa.Column(name, sa.BigInteger(), nullable=True))


def downgrade() -> None:
    for table in ("tenants", "api_keys"):
        for name in LIMITS:
            op.drop_column(table, name)

#!/bin/sh
# The part of the real image's entry point that compose.yaml uses: creates a database and its owner on the first start, then starts the server.
set -eu
if [ ! -s "$PGDATA/PG_VERSION" ]; then
    password=$(mktemp)
    printf '%s' "$POSTGRES_PASSWORD" >"$password"
    # shellcheck disable=SC2086  # as the real one: several arguments
    initdb --username="$POSTGRES_USER" --pwfile="$password" --encoding=UTF8 ${POSTGRES_INITDB_ARGS:-}
    export PGPASSWORD="$POSTGRES_PASSWORD"
    rm "$password"
    echo "host all all all scram-sha-256" >>"$PGDATA/pg_hba.conf"
    pg_ctl -D "$PGDATA" -o "-c listen_addresses=''" -w start
    createdb --username="$POSTGRES_USER" "$POSTGRES_DB"
    pg_ctl -D "$PGDATA" -m fast -w stop
fi
exec "$@" -c listen_addresses='*'

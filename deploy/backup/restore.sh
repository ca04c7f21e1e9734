#!/bin/sh
# Restores a backup of backup.sh into an empty database and an empty object store: sh deploy/backup/restore.sh FOLDER
#
#   DATABASE_URL               an empty database, with the login of a superuser
#   LMAAS_DATABASE_PASSWORDS   gateway=…,controller=…,replica=…,jobs=…: passwords of the database roles
#   OBJECTS                    the folder of the object store; empty for a bucket
#   LMAAS                      the path of the command `lmaas` of the release that made the backup, or of a later one
#
# Start the service with an empty Valkey afterwards (docs/how-to/backup.md).
set -eu
folder=${1:?"say which folder has the backup"}
: "${DATABASE_URL:?"set DATABASE_URL"}"
query() { PGOPTIONS=--client-min-messages=warning psql --no-psqlrc --no-password --quiet --tuples-only --no-align --set=ON_ERROR_STOP=1 --dbname="$DATABASE_URL" --command="$1"; }
migrate() { LMAAS_DATABASE_URL=$DATABASE_URL "${LMAAS:-lmaas}" migrate; }

if [ -n "${OBJECTS:-}" ] && [ -n "$(ls -A "$OBJECTS" 2>/dev/null)" ]; then
    echo "$OBJECTS is not empty. Restore into an empty folder." >&2
    exit 1
fi
tables=$(query "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'")
[ "$tables" = 0 ] || { echo "The database has $tables tables. Restore into an empty one." >&2; exit 1; }
# A dump has rights and policies, but not the roles that they name. A migration makes these, and tables, which make room for the dump's.
migrate
query "DROP SCHEMA public CASCADE; CREATE SCHEMA public"
pg_restore --exit-on-error --single-transaction --no-password --dbname="$DATABASE_URL" "$folder/database.dump"
# The migrations that the backup lacks, and the rights and passwords of this release.
migrate
if [ -n "${OBJECTS:-}" ]; then
    mkdir -p "$OBJECTS"
    cp -R "$folder/objects/." "$OBJECTS"
fi
echo "The backup is restored."

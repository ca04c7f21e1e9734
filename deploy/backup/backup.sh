#!/bin/sh
# Copies the database, and then the object store, into a new folder: sh deploy/backup/backup.sh FOLDER
#
#   DATABASE_URL   the database, with a login that sees every row: a superuser, or lmaas_migrator (docs/how-to/backup.md)
#   OBJECTS        the folder of the object store; empty for a bucket, which keeps its own versions
#
# The service may run meanwhile. The order matters: what the dump names is in the object store when that is copied.
set -eu
folder=${1:?"say which new folder the backup goes to"}
: "${DATABASE_URL:?"set DATABASE_URL"}"
umask 077
mkdir "$folder"
pg_dump --format=custom --enable-row-security --no-password --file="$folder/database.dump" "$DATABASE_URL"
if [ -n "${OBJECTS:-}" ]; then
    # Fails if a file is deleted at this moment. Then remove the folder and run it again.
    cp -R "$OBJECTS/." "$folder/objects"
fi
echo "The backup is in $folder."

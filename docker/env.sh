#!/bin/sh
# Writes .env from .env.example, with a random secret wherever the example has none:  sh docker/env.sh
# An .env that is there already stays as it is.
set -eu
cd "$(dirname "$0")/.."
if [ -e .env ]; then
    echo ".env is there already; nothing was changed." >&2
    exit 0
fi
umask 077
random() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }
while IFS= read -r line || [ -n "$line" ]; do
    case $line in
    LMAAS_OPERATOR_KEY=) line="LMAAS_OPERATOR_KEY=sk-lmaas-$(random)" ;;
    *_PASSWORD=) line="$line$(random)" ;;
    esac
    printf '%s\n' "$line"
done <.env.example >.env
echo "Wrote .env. Keep it to yourself: it holds the operator's key and the passwords."

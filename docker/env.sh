#!/bin/sh
# Writes .env from .env.example, with a random secret wherever the example has none:  sh docker/env.sh
# The lines of an existing .env are kept. Lines that a newer release adds to the example are added to it.
set -eu
cd "$(dirname "$0")/.."
umask 077
random() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }
new=.env.$$
trap 'rm -f "$new"' EXIT
if [ -e .env ]; then
    cat .env >"$new"
    [ -z "$(tail -c 1 .env)" ] || echo >>"$new"
else
    : >"$new"
fi
added=""
while IFS= read -r line || [ -n "$line" ]; do
    case $line in
    "#"* | "") [ -e .env ] || printf '%s\n' "$line" >>"$new" && continue ;;
    esac
    name=${line%%=*}
    ! grep -q "^$name=" "$new" || continue
    case $line in
    LMAAS_*_KEY=) line="${line}sk-lmaas-$(random)" ;;
    *_PASSWORD=) line="$line$(random)" ;;
    esac
    printf '%s\n' "$line" >>"$new"
    added="$added $name"
done <.env.example
if [ -e .env ] && [ -z "$added" ]; then
    echo ".env is complete; nothing was changed." >&2
elif [ -e .env ]; then
    mv "$new" .env
    echo "Added to .env:$added"
else
    mv "$new" .env
    echo "Wrote .env. Keep it to yourself: it holds the operator's key and the passwords."
fi

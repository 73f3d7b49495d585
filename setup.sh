#!/bin/sh
# Makes the virtual environment: setup.sh PYTHON VENV. Called by make.
set -eu
python=$1
venv=$2

fail() {
    echo "unclip: $1" >&2
    exit 2
}

command -v "$python" >/dev/null || fail "$python is not installed; install it with: sudo apt-get install -y python3 python3-venv"
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' ||
    fail "$("$python" --version) is not supported; use Python 3.11 to 3.13, for example: make PYTHON=python3.12"
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "Python's venv module is missing; install it with: sudo apt-get install -y python3-venv"

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
echo "installing into $venv (2 to 3 minutes the first time)"
# pip resolves torch with torchvision here, so that their builds match.
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable '.[dev]'

#!/usr/bin/env bash
# install_tool.sh v1
#
# Installs qverify and onnxruntime at the pinned versions into a virtual environment inside the repository
# (QVERIFY_VENV names another place). Works as root and as a user; sudo is used only if Python >= 3.11 is missing.
set -euo pipefail

if [ "${1:-}" != v1 ]; then
    echo "install_tool.sh: expected 'v1' as the first argument, got '${1:-}'" >&2
    exit 1
fi

repo=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
venv=${QVERIFY_VENV:-$repo/.venv-vnncomp}

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return 0
        fi
    done
    return 1
}

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        DEBIAN_FRONTEND=noninteractive "$@"
    else
        sudo -E DEBIAN_FRONTEND=noninteractive "$@"
    fi
}

if ! find_python >/dev/null; then
    as_root apt-get update
    as_root apt-get install -y python3-venv || true # enough where python3 is new, as on Ubuntu 24.04
    if ! find_python >/dev/null; then
        as_root apt-get install -y python3.11 python3.11-venv # Ubuntu 22.04
    fi
fi
python=$(find_python) || {
    echo "install_tool.sh: Python 3.11 or newer is needed and could not be installed" >&2
    exit 1
}

"$python" -m venv --clear "$venv"
pip=("$venv/bin/python" -m pip install --disable-pip-version-check --constraint "$repo/requirements.txt")
"${pip[@]}" hatchling # with its pin, instead of the newest one that an isolated build would fetch
"${pip[@]}" --no-build-isolation "$repo[cpu]"
"$venv/bin/qverify" --version

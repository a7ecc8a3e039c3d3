#!/bin/sh
# Makes a virtual environment and installs this checkout into it: launch/bootstrap.sh VENV [EXTRA].
# Called by the Makefile. PYTHON names the interpreter to use; otherwise the first one on PATH that will do.
set -eu

venv=$1
extra=${2:-}
cd "$(dirname "$0")/.."

fail() {
    printf '%s\n' "$*" >&2
    exit 1
}

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# Debian and Ubuntu ship Python without ensurepip, and `python -m venv` then fails with a page of text.
has_venv() {
    "$1" -c 'import ensurepip, venv' 2>/dev/null
}

find_python() {
    without_venv=
    for candidate in ${PYTHON:-python3 python3.12 python3.13 python3.11}; do
        new_enough "$candidate" || continue
        if has_venv "$candidate"; then
            python=$candidate
            return
        fi
        without_venv=${without_venv:-$candidate}
    done
    if [ -n "$without_venv" ]; then
        version=$("$without_venv" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        fail "$without_venv cannot make virtual environments: install its venv module (Debian, Ubuntu: apt install python$version-venv) and run make again."
    fi
    found=$("${PYTHON:-python3}" --version 2>&1) || found="no ${PYTHON:-python3} that runs"
    fail "jaxreason needs Python 3.11 or later and found $found: install Python 3.12, or name an interpreter with make PYTHON=/path/to/python3.12."
}

if ! { [ -x "$venv/bin/python" ] && new_enough "$venv/bin/python" && "$venv/bin/python" -m pip --version >/dev/null 2>&1; }; then
    find_python
    "$python" -m venv --clear "$venv"
fi

what=jaxreason${extra:+[$extra]}
echo "Installing $what and what it needs into $venv; the first time takes about a minute." >&2
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".${extra:+[$extra]}" ||
    fail "Installing $what into $venv failed (see above); once that is mended, run make again."
touch "$venv/.installed" ${extra:+"$venv/.installed-$extra"}

#!/bin/sh
# Make a virtual environment and install the project into it:  make-venv.sh PYTHON VENV REQUIREMENT
#
# Debian and Ubuntu split ensurepip, without which venv cannot give an environment its pip, off into
# a package of its own. Where it is missing, root installs that package; anybody else gets pip as any
# other Python package is got, from the index.
set -eu

python=$1
venv=$2
requirement=$3

die() {
    echo "make-venv: $*" >&2
    exit 1
}

command -v "$python" >/dev/null || die "there is no '$python' here; name another: make PYTHON=python3.12 ..."
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "cowstore needs Python 3.11 or later and '$python' is $version; name another: make PYTHON=python3.12 ..."

has_ensurepip() {
    "$python" -c 'import ensurepip, venv' 2>/dev/null
}

if ! has_ensurepip && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "make-venv: installing python$version-venv"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "python$version-venv" >/dev/null; } ||
        echo "make-venv: that failed; trying without it" >&2
fi

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    if has_ensurepip; then
        "$python" -m venv --clear "$venv"
    else
        advice="install it and try again: sudo apt-get install python$version-venv"
        "$python" -m venv --clear --without-pip "$venv" || die "Python's venv module is missing; $advice"
        "$venv/bin/python" tools/fetch_pip.py || die "Python's ensurepip module is missing; $advice"
    fi
fi

"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$requirement"

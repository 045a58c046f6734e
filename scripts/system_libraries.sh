#!/bin/sh
# Install what ffcv needs to build: a C++ compiler, pkg-config, OpenCV 4, libturbojpeg and Python's headers.
# Does nothing where all of it is there. Usage: sh scripts/system_libraries.sh PYTHON
set -eu
python=${1:-python3}
debian="g++ pkg-config libopencv-dev libturbojpeg0-dev"
conda="cxx-compiler pkg-config opencv libjpeg-turbo"

missing() {
    command -v g++ >/dev/null 2>&1 || echo "g++"
    if command -v pkg-config >/dev/null 2>&1; then
        pkg-config --exists opencv4 || pkg-config --exists opencv || echo "OpenCV (opencv4.pc)"
        pkg-config --exists libturbojpeg || echo "libturbojpeg (libturbojpeg.pc)"
    else
        echo "pkg-config"
    fi
    header=$("$python" -c 'import os, sysconfig; print(os.path.join(sysconfig.get_paths()["include"], "Python.h"))')
    test -f "$header" || echo "Python.h"
    "$python" -c 'import ensurepip, venv' >/dev/null 2>&1 || echo "Python's venv module"
}

lacking=$(missing | paste -sd, - | sed 's/,/, /g')
test -n "$lacking" || exit 0
echo "ffcv needs system libraries that are missing here: $lacking"

root=""
if [ "$(id -u)" != 0 ]; then
    root="sudo"
    command -v sudo >/dev/null 2>&1 && sudo -n true >/dev/null 2>&1 || root="none"
fi
if command -v apt-get >/dev/null 2>&1 && [ "$root" != none ]; then
    case "$lacking" in *Python*) debian="$debian python3-dev python3-venv" ;; esac
    echo "installing with apt: $debian"
    $root env DEBIAN_FRONTEND=noninteractive apt-get -qq update
    # shellcheck disable=SC2086  # a list of packages
    $root env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $debian >/dev/null
    lacking=$(missing | paste -sd, - | sed 's/,/, /g')
    test -n "$lacking" || exit 0
fi
cat >&2 <<END
Still missing: $lacking. They could not be installed from here. Install them, then run the command again:
  Debian, Ubuntu:  sudo apt-get install $debian
  conda:           conda install -c conda-forge $conda
END
exit 1

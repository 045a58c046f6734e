#!/bin/sh
# Install what ffcv needs to build: a C++ compiler, pkg-config, OpenCV 4, libturbojpeg and Python's headers.
# Does nothing if all of it is installed. Before it runs sudo, it shows the commands and asks; with YES=1, or without a
# terminal, it does not ask. Usage: [YES=1] sh scripts/system_libraries.sh PYTHON
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

case "$lacking" in *Python*) debian="$debian python3-dev python3-venv" ;; esac
update="env DEBIAN_FRONTEND=noninteractive apt-get -qq update"
install="env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $debian"

# Whether the user agrees: asks in a terminal, unless YES=1.
agreed() {
    case "${YES:-}" in 1 | y | yes | true) return 0 ;; esac
    [ -t 0 ] || return 0
    printf "Run that? [y/N] " >&2
    read -r answer || answer=""
    case "$answer" in [yY] | [yY][eE][sS]) return 0 ;; esac
    return 1
}

if ! command -v apt-get >/dev/null 2>&1; then
    root="none"
elif [ "$(id -u)" = 0 ]; then
    root=""
    echo "installing with apt: $debian"
elif command -v sudo >/dev/null 2>&1; then
    root="sudo"
    [ -t 0 ] || root="sudo -n"
    printf 'To install them, this runs:\n  %s\n  %s\n' "$root $update" "$root $install"
    agreed || root="none"
else
    root="none"
fi
if [ "$root" != none ]; then
    # shellcheck disable=SC2086  # lists of words
    $root $update && $root $install >/dev/null || echo "apt could not install them." >&2
    lacking=$(missing | paste -sd, - | sed 's/,/, /g')
    test -n "$lacking" || exit 0
fi
cat >&2 <<END
Still missing: $lacking. They were not installed from here. Install them, then run the command again:
  Debian, Ubuntu:  sudo apt-get install $debian
  conda:           conda install -c conda-forge $conda
or do without FFCV, with which only comparisons are made, in an environment of your own:
  pip install '.[train,quickstart]'
END
exit 1

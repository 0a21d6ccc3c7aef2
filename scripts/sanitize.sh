#!/usr/bin/env bash
# Run the native contract suite against a core built with address and undefined-behaviour sanitizers:
# sanitize.sh PYTHON [pytest arguments]
# Several may run at a time: one builds, the others wait for it, and each has a package of its own.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath --no-symlinks "$1")
shift
mkdir -p build
exec 9>build/sanitize.lock
flock 9
# Where variables live is not tracked: with sanitizers that takes most of the compiler's time, and a stack needs lines only.
cmake -S . -B build/sanitize -DPAGEMILL_SANITIZE=ON -DPython_EXECUTABLE="$python" -DCMAKE_BUILD_TYPE=Debug \
  "-DCMAKE_CXX_FLAGS_DEBUG=-O1 -g -fno-var-tracking" >build/sanitize.log || { cat build/sanitize.log; exit 1; }
cmake --build build/sanitize --parallel 2 >>build/sanitize.log 2>&1 || { tail -50 build/sanitize.log; exit 1; }
site=$(mktemp -d build/sanitize/site.XXXXXX)
trap 'rm -rf "$site"' EXIT
cp -r src/pagemill "$site/"
rm -f "$site"/pagemill/kernels/_native*.so
cp build/sanitize/_native*.so "$site/pagemill/kernels/"
exec 9>&-
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
preload="$(gcc -print-file-name=libasan.so):$(gcc -print-file-name=libubsan.so)"
# -S leaves .pth files unread, so that the editable install does not put the other core in front.
env PYTHONPATH="$PWD/$site:$packages" PAGEMILL_THREADS=2 OPENBLAS_NUM_THREADS=1 LD_PRELOAD="$preload" \
  ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
  "$python" -S -m pytest -q -p no:cacheprovider -W ignore::DeprecationWarning "${@:-tests/kernels}"

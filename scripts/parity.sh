#!/usr/bin/env bash
# Compare with transformers: parity.sh PYTHON DIRECTORY [pytest arguments]. DIRECTORY gets an environment with torch and
# transformers that sees PYTHON's packages behind its own, so that neither disturbs the other.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 directory=$2
shift 2
requirements=$(scripts/extra.sh "$python" parity)
stamp=$directory/.installed
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$requirements" ]; then
  echo "setting up $directory with torch and transformers"
  rm -rf "$directory"
  "$python" -m venv "$directory"
  pip=("$directory/bin/python" -m pip --disable-pip-version-check -qq)
  # torch first and alone: whichever build of that version the index or PIP_FIND_LINKS offers stays.
  grep '^torch==' <<<"$requirements" | xargs -d '\n' "${pip[@]}" install
  grep -v '^torch==' <<<"$requirements" | xargs -d '\n' "${pip[@]}" install
  site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  own=$("$directory/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  echo "import site; site.addsitedir('$site')" >"$own/zz-pagemill.pth"
  echo "$requirements" >"$stamp"
fi
OPENBLAS_NUM_THREADS=1 exec "$directory/bin/python" -m pytest -q -m parity --durations=5 tests "$@"

#!/usr/bin/env bash
# Ask a real server with other projects' clients: clients.sh PYTHON DIRECTORY [pytest arguments]. DIRECTORY gets two
# environments, since LlamaIndex needs an older generation of OpenAI's SDK than LangChain and lm-eval do: that SDK is
# tested in both. The server runs in PYTHON's own environment.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 directory=$2
shift 2

# set_up NAME EXTRA: an environment with the extra's packages that sees PYTHON's behind them.
set_up() {
  local place=$directory/$1 requirements site own
  requirements=$(scripts/extra.sh "$python" "$2")
  if [ -f "$place/.installed" ] && [ "$(cat "$place/.installed")" = "$requirements" ]; then return; fi
  echo "setting up $place with" $requirements
  rm -rf "$place"
  "$python" -m venv --without-pip "$place"
  xargs -d '\n' "$python" -m pip --disable-pip-version-check -qq --python "$place/bin/python" install <<<"$requirements"
  site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  own=$("$place/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  echo "import site; site.addsitedir('$site')" >"$own/zz-pagemill.pth"
  echo "$requirements" >"$place/.installed"
}

set_up current clients
set_up llamaindex clients-llamaindex
SERVER_PYTHON=$(realpath -s "$python")
export SERVER_PYTHON OPENBLAS_NUM_THREADS=1 ANONYMIZED_TELEMETRY=false LANGSMITH_TRACING=false
# Warnings of other projects' code are theirs.
run=(-m pytest -q -m clients -W default --durations=5)
"$directory/current/bin/python" "${run[@]}" tests/clients --ignore tests/clients/test_llamaindex.py "$@"
exec "$directory/llamaindex/bin/python" "${run[@]}" tests/clients/test_llamaindex.py tests/clients/test_openai_*.py "$@"

#!/usr/bin/env bash
# Print the requirements of an extra of pyproject.toml, one a line: extra.sh PYTHON EXTRA
set -euo pipefail
cd "$(dirname "$0")/.."
exec "$1" - "$2" <<'PY'
import sys
import tomllib

with open("pyproject.toml", "rb") as stream:
    print(*tomllib.load(stream)["project"]["optional-dependencies"][sys.argv[1]], sep="\n")
PY

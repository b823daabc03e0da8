#!/usr/bin/env bash
# The one check: lint, format, tests. Arguments go to pytest: bash scripts/test.sh tests/losses -x
# Tests marked slow are left out; bash scripts/test.sh -m "" runs all.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
make_environment test
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
exec .venv/bin/python -m pytest -q "$@"

#!/usr/bin/env bash
# The one check: lint, format, tests. Arguments go to pytest: bash scripts/test.sh tests/losses -x
# Tests marked slow are left out; bash scripts/test.sh -m "" runs all. Two processes, because most of
# the time is compilation, which uses one core.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
make_environment test
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
exec .venv/bin/python -m pytest -q -n 2 --dist worksteal "$@"

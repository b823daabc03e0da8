#!/usr/bin/env bash
# Trains the quickstart model, from random weights to multi-objective RL, into runs/quickstart.
# Arguments are overrides of the configuration: bash scripts/quickstart.sh seed=1
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
make_environment run
exec .venv/bin/jaxrl-reason run configs/quickstart.yaml "$@"

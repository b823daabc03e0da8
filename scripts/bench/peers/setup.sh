#!/usr/bin/env bash
# Make the environments of the peers that scripts/bench/compare.py runs: DIR/torch and DIR/jax.
#
#   bash scripts/bench/peers/setup.sh environments
#
# PYTHON_TORCH and PYTHON_JAX name the interpreters; jax 0.12 needs Python 3.12. Pip's own
# configuration decides whether torch comes with or without CUDA.
set -euo pipefail
if [ $# -ne 1 ]; then
    echo "usage: bash $0 DIR" >&2
    exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"

"${PYTHON_TORCH:-python3.11}" -m venv "$1/torch"
"$1/torch/bin/pip" install --requirement "$here/torch.txt"
"${PYTHON_JAX:-python3.12}" -m venv "$1/jax"
"$1/jax/bin/pip" install --requirement "$here/jax.txt"

#!/usr/bin/env bash
# Run the test suite, or the part that the arguments name (they go to pytest). Sets itself up on a fresh machine.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./setup_venv.sh
export OMP_NUM_THREADS=1 # faster for tensors this small, and one thread gives the same sums on every machine
exec .venv/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal "$@"

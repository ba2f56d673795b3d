#!/usr/bin/env bash
# Runs the test suite, or the part of it named by the arguments (they go to pytest). Sets itself up on a fresh machine.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./setup_venv.sh
export OMP_NUM_THREADS=1 # tensors this small are faster so, and one thread gives the same sums on every machine
exec .venv/bin/python -m pytest "$@"

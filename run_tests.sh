#!/usr/bin/env bash
# Set-up and the tests. Arguments go to pytest:  bash run_tests.sh -m slow
set -euo pipefail
cd "$(dirname "$0")"
source ./setup.sh
python -m pytest -n 2 --dist worksteal "$@"

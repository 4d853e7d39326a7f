# Sourced by run_all.sh and run_tests.sh: makes .venv if it is missing or older than what it was made from, and activates it.
stamp=$(cat requirements.txt pyproject.toml | cksum)
if [ "$(cat .venv/.made_from 2>/dev/null || true)" != "$stamp" ]; then
  echo "== setting up .venv" >&2
  [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
  .venv/bin/python -m pip install --quiet --requirement requirements.txt
  .venv/bin/python -m pip install --quiet --no-deps --editable .
  echo "$stamp" > .venv/.made_from
fi
source .venv/bin/activate
export OMP_WAIT_POLICY=PASSIVE   # idle threads sleep instead of spinning

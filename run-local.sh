#!/usr/bin/env bash
# The whole loop as local processes: papers → index → search and solver services → training → report.
# `run-local.sh serve`: only the two services, until it is stopped; "serving …" on stdout says that they answer.
#
# Called by `make demo`, `make serve` and the notebook, in the environment of .venv; settings come from DRZERO_ variables.
# Finished stages are reused. Ends with the status of the step that failed, or 0, and stops everything that it started,
# also on Ctrl-C.
set -euo pipefail
cd "$(dirname "$0")"
export PYTHON=$PWD/.venv/bin/python
readonly NAME="make ${1:-demo}"

die() {
  echo "$NAME: $*" >&2
  exit 1
}

# Runs one module to its end. In the background, because only `wait` lets a signal through to the traps at once.
step() {
  local status=0
  setpriv --pdeathsig TERM "$PYTHON" -m "$@" &
  step_pid=$!
  wait "$step_pid" || status=$?
  step_pid=
  [ "$status" -le 128 ] || echo "$NAME: $1 was killed (signal $((status - 128)));" \
    "the same command again goes on where it stopped" >&2
  [ "$status" -eq 0 ] || exit "$status"
}

stop_all() {
  local status=$? pid
  trap - EXIT INT TERM
  for pid in $step_pid $services_pid; do # the step first: it uses the services
    kill -TERM "$pid" 2>/dev/null || continue
    wait "$pid" 2>/dev/null || true
  done
  rm -rf "$CONTROL_DIR"
  exit "$status"
}

require_free_port() { # service, port, beginning of the address under which clients find it
  if (exec 3<>"/dev/tcp/127.0.0.1/$2") 2>/dev/null; then
    die "port $2 is in use, expected it free for $1; stop what listens there (another run of this?)" \
      "or choose another: DRZERO_${1^^}__PORT=…${3:+ DRZERO_${1^^}__URL=$3…}"
  fi
}

await() { # service, address
  local deadline=$((SECONDS + start_s))
  until "$PYTHON" -c 'import httpx, sys; httpx.get(sys.argv[1], timeout=5, trust_env=False).raise_for_status()' "$2" 2>/dev/null; do
    if "$PYTHON" -m supervisor.supervisorctl -c supervisord.conf status "$1" | grep -q FATAL; then
      tail -5 "$LOG_DIR/$1.log" >&2
      die "$1 does not start; its last lines are above, all of them in $LOG_DIR/$1.log"
    fi
    [ "$SECONDS" -lt "$deadline" ] ||
      die "$1 does not answer after $start_s s (DRZERO_TRAINER__START_PATIENCE_S); its log is $LOG_DIR/$1.log"
    sleep 1
  done
}

start_services() {
  # In a session of its own: Ctrl-C goes to everything in the terminal's, and the services must outlive the trainer.
  setpriv --pdeathsig TERM setsid "$PYTHON" -m supervisor.supervisord -c supervisord.conf &
  services_pid=$!
  for url in $retrieval_url; do await retrieval "$url/ready"; done
  for url in $solver_url; do await solver "$url/health"; done
}

[[ "${1:-}" =~ ^(serve)?$ ]] || die "expected no argument, or serve; found $1"

step_pid='' services_pid=''
CONTROL_DIR=$(mktemp -d "${TMPDIR:-/tmp}/drzero.XXXXXX")
export CONTROL_DIR
trap stop_all EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

settings=$("$PYTHON" -c '
import sys
from shared.balance import addresses_in
from shared.settings import SettingsError, load_settings
try:
    s = load_settings()
except SettingsError as error:
    raise SystemExit(f"{sys.argv[1]}: {error}")
print(s.retrieval.port, s.solver.port, s.trainer.port, " ".join(addresses_in(s.retrieval.url)), " ".join(addresses_in(s.solver.url)),
      round(s.trainer.start_patience_s), s.storage.data_dir.absolute() / "index", s.storage.scratch_dir.absolute() / "logs",
      sep="\n")' "$NAME")
{
  read -r retrieval_port && read -r solver_port && read -r trainer_port
  read -r retrieval_url && read -r solver_url && read -r start_s && read -r index && read -r LOG_DIR
} <<<"$settings"
export LOG_DIR
mkdir -p "$LOG_DIR"

require_free_port retrieval "$retrieval_port" http://127.0.0.1:
require_free_port solver "$solver_port" http://127.0.0.1:
if [ "${1:-}" = serve ]; then
  [ -f "$index/manifest.json" ] || die "expected an index in $index, found none; python -m services.ingest, then" \
    "python -m services.retrieval.build make it"
  start_services
  echo "serving: search at $retrieval_url, solver at $solver_url"
  wait "$services_pid" || true
  die "the services have ended; their logs are in $LOG_DIR"
fi

require_free_port trainer "$trainer_port"
step shared.doctor
step services.ingest
step services.retrieval.build
start_services
step services.trainer # prints where the report is

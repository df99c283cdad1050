#!/usr/bin/env bash
# A study on this machine and a few others: docs/cluster/ssh.sh 10.0.0.1 gpu1 gpu2 -- [arguments of `python -m pipelines study`]
# The first argument is the address at which the others reach this machine; the other arguments are names of hosts for ssh. Each host
# needs the packages of requirements.lock in the virtual environment DIT_VENV (default: ~/dit-venv), and the credentials of the DVC
# remote, if there are any.
set -euo pipefail

address=$1 port=${RAY_PORT:-6379}
shift
hosts=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do hosts+=("$1"); shift; done
[ $# -gt 0 ] && shift
PATH=$PWD/.venv/bin:$PATH
remote_venv=${DIT_VENV:-dit-venv}
umask 077
mkdir -p .scratch

secret() { python -c 'import secrets; print(secrets.token_hex(32))'; }
RAY_AUTH_TOKEN=$(secret)
password=study:$(secret)
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
export PREFECT_HOME=$PWD/.scratch/prefect-ssh PREFECT_SERVER_API_AUTH_STRING=$password PREFECT_SERVER_ANALYTICS_ENABLED=false
PREFECT_API_URL= prefect server start --no-ui --host "$address" --port $((port + 1)) > .scratch/prefect-ssh.log 2>&1 &
server=$!
export PREFECT_API_URL=http://$address:$((port + 1))/api PREFECT_API_AUTH_STRING=$password

ray start --head --block --node-ip-address "$address" --port "$port" --include-dashboard false --disable-usage-stats \
  > .scratch/ray-head.log 2>&1 &
started=("$server" $!)
trap 'kill "${started[@]}" 2> /dev/null; wait 2> /dev/null' EXIT
until ray health-check --address "$address:$port" > /dev/null 2>&1; do sleep 1; done
for host in "${hosts[@]}"; do
  # The token is sent by standard input. When this ssh ends, that input ends too, and the shell on the host then stops Ray there.
  { printf '%s\n' "$RAY_AUTH_TOKEN"; sleep infinity; } | ssh -o BatchMode=yes "$host" "
    read -r RAY_AUTH_TOKEN; export RAY_AUTH_TOKEN RAY_AUTH_MODE=token
    $remote_venv/bin/ray start --block --address $address:$port --disable-usage-stats & raylet=\$!
    cat > /dev/null; kill \$raylet" > ".scratch/ray-$host.log" 2>&1 &
  started+=($!)
done

RAY_ADDRESS=$address:$port python -m pipelines study --engine ray "$@"

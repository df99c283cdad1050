#!/usr/bin/env bash
# A study on Slurm: sbatch --nodes 8 --gpus-per-node 8 docs/cluster/slurm.sh [arguments of `python -m pipelines study`]
# Submit it in the study's folder, after `make install`. The first node is the head. If not all nodes see this folder, first give the
# study a remote: dvc remote add --default NAME URL
#SBATCH --job-name dit-study
#SBATCH --ntasks-per-node 1
#SBATCH --cpus-per-task 64
#SBATCH --time 24:00:00
#SBATCH --signal B:INT@120
set -euo pipefail

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(getent ahostsv4 "$head" | awk 'NR == 1 { print $1 }')
port=$((20000 + SLURM_JOB_ID % 10000))
PATH=$PWD/.venv/bin:$PATH
umask 077

# Passwords of this job are passed in the environment, so no command line shows them. Ray refuses whoever does not know its token.
secret() { python -c 'import secrets; print(secrets.token_hex(32))'; }
RAY_AUTH_TOKEN=$(secret)
password=study:$(secret)
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN DIT_WORK=${DIT_WORK:-${TMPDIR:-/tmp}/dit-$SLURM_JOB_ID}

# A Prefect API that every node of the job can reach. For thousands of runs, also give it a PostgreSQL database:
# PREFECT_API_DATABASE_CONNECTION_URL=postgresql+asyncpg://...
export PREFECT_HOME=$PWD/.scratch/prefect-$SLURM_JOB_ID PREFECT_SERVER_API_AUTH_STRING=$password PREFECT_SERVER_ANALYTICS_ENABLED=false
PREFECT_API_URL= prefect server start --no-ui --host "$address" --port $((port + 1)) > ".scratch/prefect-$SLURM_JOB_ID.log" 2>&1 &
server=$!
export PREFECT_API_URL=http://$address:$((port + 1))/api PREFECT_API_AUTH_STRING=$password

# One raylet (Ray's process) on every node. Ray finds the cores, and the GPUs that Slurm gave to the job.
srun --nodes 1 --nodelist "$head" ray start --head --block --node-ip-address "$address" --port "$port" \
  --include-dashboard false --disable-usage-stats &
until ray health-check --address "$address:$port" > /dev/null 2>&1; do sleep 1; done
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
  srun --nodes $((SLURM_JOB_NUM_NODES - 1)) --exclude "$head" ray start --block --address "$address:$port" --disable-usage-stats &
fi

trap 'kill "$study" "$server" 2> /dev/null' INT TERM
RAY_ADDRESS=$address:$port python -m pipelines study --engine ray "$@" &
study=$!
wait "$study" && code=0 || code=$?
kill "$server"
exit "$code"

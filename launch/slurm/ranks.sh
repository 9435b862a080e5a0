# Sourced by the batch scripts beside it: one process per SLURM task, and what follows a signal.
#
# PYTHON            interpreter, default .venv/bin/python of the folder the job was submitted from
# DEEPSPEED_CONFIG  file of ds_configs/ for ZeRO; without it every rank holds the whole model
#
# SLURM starts the ranks itself, with no launcher in between: its signal before the time limit
# reaches them directly, and so does their exit status come back.
cd "$SLURM_SUBMIT_DIR" || exit
export PYTHON=${PYTHON:-.venv/bin/python}
if [[ -n ${DEEPSPEED_CONFIG:-} ]]; then
    export ACCELERATE_USE_DEEPSPEED=true ACCELERATE_DEEPSPEED_CONFIG_FILE=$DEEPSPEED_CONFIG
fi

# The rendezvous is on the first node of the job, at the address by which SLURM reaches it.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# prune.py with these arguments on every task; continues what an earlier start of the job left.
# Status 75 means that a signal stopped it with its state saved: the job goes back into the queue.
prune() {
    local status=0
    # A rank that fails leaves the others waiting: they are ended a minute later.
    srun --wait=60 bash -c '
        export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
        exec "$PYTHON" llm_vtrans/prune.py "$@"' prune "$@" --resume || status=$?
    if ((status == 75)); then
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$status"
}

#!/bin/bash
# One run on two machines under SLURM: sbatch experiments/cluster/slurm.sh
#
# It needs: tljax installed in an environment that all machines see; a run directory on a file system that all of
# them see, since the first process writes it and all read it; and machines that reach each other by TCP. --distributed
# asks SLURM for the rest. When a machine is lost, all processes end within --heartbeat seconds with exit code 1; the
# same script goes on with what is not finished, and --requeue has SLURM start it again where a machine failed.
#
# Fill in the partition, the environment and the two folders.
#SBATCH --job-name=tljax
#SBATCH --partition=FILL_IN
#SBATCH --nodes=2
#SBATCH --gpus-per-node=4           # on CPUs leave this out,
#SBATCH --ntasks-per-node=4         # have one process a machine and set --cpus-per-task; on GPUs JAX wants one a GPU
#SBATCH --time=04:00:00
#SBATCH --requeue
set -euo pipefail

ENVIRONMENT=/FILL_IN/venv           # seen by all machines
SHARED=/FILL_IN/runs                # likewise
export TFDS_DATA_DIR=/FILL_IN/data  # data sets are decoded here once; each process reads its share of them

source "$ENVIRONMENT/bin/activate"
# Without --mesh all eight share each batch; --mesh=data:4,trial:2 trains two fits at once, four devices to each.
srun --kill-on-bad-exit=1 python -m experiments.transfer \
    --flagfile=experiments/flags/quickstart.flags --distributed --heartbeat=60 --workdir="$SHARED/quickstart"

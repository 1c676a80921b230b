#!/bin/bash
# Each element of the array is a computation of its own: %A is the array's job id, %a the element.
#SBATCH --array=1-8
#SBATCH --container-checkpoint=sweep-%A-%a
#SBATCH --container-image=/shared/images/python.sif
#SBATCH --time=01:00:00
#SBATCH --requeue
#SBATCH --open-mode=append

python3 ~/sweep.py --case "$SLURM_ARRAY_TASK_ID"

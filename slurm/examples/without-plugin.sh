#!/bin/bash
# For sites without the plugin: the helper as a command.
#SBATCH --time=02:00:00
#SBATCH --requeue
#SBATCH --open-mode=append

srun container-checkpoint run --name "heat-$SLURM_JOB_ID" /shared/images/python.sif \
    python3 ~/heat.py 100000

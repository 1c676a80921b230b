#!/bin/bash
# For sites without the plugin: the helper as a command.
#SBATCH --time=02:00:00
#SBATCH --requeue
#SBATCH --open-mode=append

# Without the plugin Slurm ends the script, and srun with it, while the step is still being saved. With
# %t (the task's number) in its name slurmstepd writes the file itself, and no line is lost with srun.
srun --output="heat-%j.%t.out" --open-mode=append \
    container-checkpoint run --name "heat-$SLURM_JOB_ID" /shared/images/python.sif \
    python3 ~/heat.py 100000

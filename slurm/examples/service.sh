#!/bin/bash
# A service whose state is in memory, in the background of a job that works with it.
#SBATCH --time=02:00:00
#SBATCH --requeue
#SBATCH --open-mode=append

srun --output="server-%j.%t.out" --open-mode=append \
    container-checkpoint run --name "server-$SLURM_JOB_ID" --startscript /shared/images/server.sif 8888 &

python3 ~/work-with-it.py http://localhost:8888

# Saved and ended; the next job that runs server-JOBID goes on from there. The script goes on.
container-checkpoint save "server-$SLURM_JOB_ID" --stop --wait

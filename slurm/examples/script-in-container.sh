#!/bin/bash
# The batch script itself runs in the container and is saved with all that it started.
# NAME is the same in every run of this job: %j, the job id, stays over a requeue.
#SBATCH --job-name=heat
#SBATCH --container-checkpoint=heat-%j
#SBATCH --container-image=/shared/images/python.sif
#SBATCH --time=02:00:00
#SBATCH --requeue
#SBATCH --open-mode=append

python3 ~/heat.py 100000

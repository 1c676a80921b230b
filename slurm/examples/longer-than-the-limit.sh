#!/bin/bash
# Work for days in a queue of one hour: saved before each time limit, requeued, continued. A name
# without %j goes on with a new job, too: submit this again after it was cancelled.
#SBATCH --job-name=climate
#SBATCH --container-checkpoint=%x
#SBATCH --container-image=/shared/images/openmp.sif
#SBATCH --container-checkpoint-interval=30m
#SBATCH --time=01:00:00
#SBATCH --requeue
#SBATCH --open-mode=append

/opt/model/run --years 100

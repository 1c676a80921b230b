#!/bin/bash
# The script runs on the node; each srun step is saved by itself, and a step that was interrupted goes
# on where it was. The script starts again from its first line after a requeue, so what stands
# outside of srun should not mind that.
#SBATCH --job-name=pipeline
#SBATCH --container-checkpoint=pipeline-%j
#SBATCH --time=02:00:00
#SBATCH --requeue
#SBATCH --open-mode=append

mkdir -p results
srun --container-image=/shared/images/python.sif python3 prepare.py results/grid.npy
srun --container-image=/shared/images/python.sif python3 solve.py results/grid.npy

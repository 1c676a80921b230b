"""Heat spreading over a square plate: the five-point stencil, Jacobi's iteration.

usage: heat.py STEPS [EVERY [CELLS]]

Prints the residual every EVERY steps (default 100) and at the end the SHA-256 of the field, on
plates of CELLS x CELLS (default 600). The same arguments give the same bytes in every run.
"""
import hashlib
import sys

import numpy

arguments = [int(word) for word in sys.argv[1:]]
steps, every, cells = arguments + [100, 600][len(arguments) - 1 :]

plate = numpy.zeros((cells, cells))
plate[0, :] = 100.0
plate[:, 0] = numpy.linspace(100.0, 0.0, cells)
for step in range(1, steps + 1):
    inner = (plate[:-2, 1:-1] + plate[2:, 1:-1] + plate[1:-1, :-2] + plate[1:-1, 2:]) / 4
    if step % every == 0:
        residual = float(numpy.abs(inner - plate[1:-1, 1:-1]).max())
        print(f"step {step}: residual {residual:.12e}", flush=True)
    plate[1:-1, 1:-1] = inner
print("sha256", hashlib.sha256(plate.tobytes()).hexdigest(), flush=True)

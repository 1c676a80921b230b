"""Numbered lines until a gate file is there, fifty more, then a last line that proves the memory.

usage: lines.py GATE [CODE|SEGV]

Where GATE is a number, there are so many lines, of 10 ms each at least.
"""
import os
import signal
import sys
import time

gate = sys.argv[1]
how = sys.argv[2] if len(sys.argv) > 2 else "0"
counted = gate.isdigit()
number, state, left = 0, 1, int(gate) if counted else 50
while left > 0:
    state = (state * 6364136223846793005 + number) % 2**64
    print(number, flush=True)
    number += 1
    time.sleep(0.01)
    if counted or left < 50 or os.path.exists(gate):
        left -= 1
print("end", number, state, flush=True)
if how == "SEGV":
    os.kill(os.getpid(), signal.SIGSEGV)
sys.exit(int(how))

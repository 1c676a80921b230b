"""Numbered lines into a file until a gate file is there, fifty more, then a last line that proves
the memory.

usage: ledger.py FILE GATE
"""
import os
import sys
import time

ledger = open(sys.argv[1], "w")
number, state, left = 0, 1, 50
while left > 0:
    state = (state * 6364136223846793005 + number) % 2**64
    print(number, file=ledger, flush=True)
    number += 1
    time.sleep(0.005)
    if left < 50 or os.path.exists(sys.argv[2]):
        left -= 1
print("end", number, state, file=ledger, flush=True)

"""One stage of a script: what it prints follows from what it has in memory and from its input.

usage: stage.py NAME [GATE[,GATE] [CODE]]

Twenty lines, or where NAME ends with `-` one for each line of standard input. After the tenth, and the
fifteenth, it waits until the file GATE or GATE.open is there, and says so by GATE.reached. Every start is
noted in NAME.starts.
"""
import os
import sys
import time

name = sys.argv[1]
gates = dict(zip([9, 14], sys.argv[2].split(",") if len(sys.argv) > 2 else []))
code = int(sys.argv[3]) if len(sys.argv) > 3 else 0
seed = os.environ.get("SEED", "")
with open(name + seed + ".starts", "a") as starts:
    starts.write("started\n")
lines = sys.stdin if name.endswith("-") else (str(n) + seed for n in range(20))
state = 1
for number, line in enumerate(lines):
    for letter in line.strip():
        state = (state * 6364136223846793005 + ord(letter)) % 2**64
    print(name, number, state, flush=True)
    time.sleep(0.02)
    gate = gates.get(number)
    if gate:
        open(gate + ".reached", "w").close()
        while not (os.path.exists(gate) or os.path.exists(gate + ".open")):
            time.sleep(0.02)
print(name, "end", state, flush=True)
sys.exit(code)

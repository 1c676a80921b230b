"""Runs a command on a terminal and types a line into it when it prompts.

usage: typed.py LINE COMMAND…

What the command writes goes to standard output; SIGTERM is passed on.
"""
import os
import signal
import sys

os.environ["TERM"] = "dumb"
child, terminal = os.forkpty()
if child == 0:
    os.execvp(sys.argv[2], sys.argv[2:])
signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
line = sys.argv[1]
seen = b""
while True:
    try:
        text = os.read(terminal, 4096)
    except OSError:  # the end of a terminal
        break
    sys.stdout.buffer.write(text.replace(b"\r", b""))
    sys.stdout.buffer.flush()
    seen += text
    if line and b"> " in seen:
        os.write(terminal, line.encode() + b"\n")
        line = ""
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) % 256)

"""What is seen of Apptainer's options, before and after lines.py: usage: options.py LINES GATE [CODE]"""
import os
import sys


def facts(when):
    variables = [os.environ.get(name) for name in ("X", "FROM_FILE", "OF_THE_HOST")]
    seen = [os.path.exists(path) for path in ("/data/mark", "/home/alice/lines.py")]
    print(when, os.getcwd(), *variables, *seen, flush=True)


facts("first")
sys.argv = sys.argv[1:]
try:
    exec(open(sys.argv[0]).read())
finally:
    facts("last")

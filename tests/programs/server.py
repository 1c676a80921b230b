"""A server with its state in memory, in the manner of Apptainer's example.

GET / gives the state, POST / sets it to the one letter of its body, GET /count counts such requests.
"""
import argparse
from http.server import BaseHTTPRequestHandler, HTTPServer

parser = argparse.ArgumentParser()
parser.add_argument("port", type=int)
state, count = "0", 0


class Handler(BaseHTTPRequestHandler):
    def answer(self, text):
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self):
        global count
        if self.path == "/count":
            count += 1
            return self.answer(str(count))
        self.answer(state)

    def do_POST(self):
        global state
        state = self.rfile.read(1).decode()
        self.answer(state)

    def log_message(self, *_):
        pass


with HTTPServer(("", parser.parse_args().port), Handler) as server:
    server.serve_forever()

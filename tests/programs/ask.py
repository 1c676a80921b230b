"""Asks server.py, as soon as it listens: ask.py PORT [count | LETTER] [linger], and prints what it says.

By hand, since the nodes have Python's smallest package. The connection is reset in the end, so that
the port is free at once; "linger" as the last word leaves it closing, as most clients do.
"""
import socket
import struct
import sys
import time

port, words = int(sys.argv[1]), sys.argv[2:]
request = "GET / HTTP/1.0\r\n\r\n"
if words[:1] == ["count"]:
    request = "GET /count HTTP/1.0\r\n\r\n"
elif words and len(words[0]) == 1:
    request = f"POST / HTTP/1.0\r\nContent-Length: 1\r\n\r\n{words[0]}"
end = time.monotonic() + 60
while True:
    try:
        with socket.create_connection(("127.0.0.1", port), 20) as server:
            if words[-1:] != ["linger"]:
                server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            server.sendall(request.encode())
            answer = b"".join(iter(lambda: server.recv(4096), b""))
        print(answer.split(b"\r\n\r\n", 1)[1].decode(), flush=True)
        break
    except ConnectionRefusedError:
        if time.monotonic() > end:
            sys.exit(f"nobody listens at port {port}")
    time.sleep(0.05)

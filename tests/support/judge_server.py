"""A small endpoint on loopback that answers as a judge would, or does not."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any], int], tuple[int, str]]
"""From the body of a request and its number to a status and the text of the answer."""


@contextmanager
def judge_server(answer: Answer) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Serve an endpoint; yield its URL and the list of requests.

    A status of 0 lets the request hang until the server ends.
    """
    requests: list[dict[str, Any]] = []
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            headers = {"path": self.path, "key": self.headers.get("Authorization")}
            requests.append(body | headers)
            status, text = answer(body, len(requests))
            if not status:
                ended.wait(60)
                return
            reply = text
            if status == 200 and not text.startswith("raw "):
                reply = json.dumps({"choices": [{"message": {"content": text}}]})
            self.send_response(status)
            self.end_headers()
            self.wfile.write(reply.encode())

        def log_message(self, *arguments: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        ended.set()
        server.shutdown()
        thread.join()
        server.server_close()

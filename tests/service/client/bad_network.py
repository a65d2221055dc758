"""Proxy between client and API that injects one fault per request and forwards the rest."""

import threading
from collections import deque
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import SHUT_RDWR

import httpx

DROP = "close the connection, and pass nothing on"
LOSE = "pass the request on, and close the connection before the answer"
PASSED = ("authorization", "content-type", "idempotency-key", "last-event-id", "accept", "if-match")


@dataclass
class Answer:
    """Response that is sent without forwarding the request."""

    status: int
    headers: dict = field(default_factory=dict)
    body: bytes = b"error"


@dataclass
class Cut:
    """Close the connection after a number of bytes of the response."""

    size: int


class BadNetwork:
    def __init__(self, behind):
        self.behind, self.faults, self.seen = behind, deque(), []

    @contextmanager
    def run(self):
        network = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                network.handle(self)

            do_POST = do_GET  # noqa: N815

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            self.url = f"http://127.0.0.1:{server.server_address[1]}"
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join(10)

    def sent_keys(self):
        return [headers["Idempotency-Key"] for _, headers in self.seen]

    def handle(self, request):
        self.seen.append((f"{request.command} {request.path}", request.headers))
        fault = self.faults.popleft() if self.faults else None
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        if isinstance(fault, Answer):
            self._answer(request, fault.status, fault.headers, [fault.body])
        elif fault != DROP:
            headers = {name: value for name, value in request.headers.items() if name.lower() in PASSED}
            address = self.behind + request.path
            with (
                httpx.Client(trust_env=False, timeout=30) as client,
                client.stream(request.command, address, headers=headers, content=body) as answer,
            ):
                if fault == LOSE:
                    answer.read()
                else:
                    passed = {
                        name: answer.headers[name]
                        for name in ("Content-Type", "Content-Length")
                        if name in answer.headers
                    }
                    limit = fault.size if isinstance(fault, Cut) else None
                    self._answer(request, answer.status_code, passed, _up_to(limit, answer.iter_raw()))
        request.close_connection = True
        with suppress(OSError):  # the client has disconnected
            request.connection.shutdown(SHUT_RDWR)

    @staticmethod
    def _answer(request, status, headers, chunks):
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.end_headers()
        for chunk in chunks:
            request.wfile.write(chunk)


def _up_to(limit, chunks):
    for chunk in chunks:
        yield chunk if limit is None else chunk[:limit]
        if limit is not None and (limit := limit - len(chunk)) <= 0:
            return

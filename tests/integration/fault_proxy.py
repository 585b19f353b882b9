"""An HTTP proxy in front of an S3 server that injects faults of networks and busy servers."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import urlsplit

SLOW_S = 0.3


class Fault(StrEnum):
    """A fault of one request; those with a status are answers in the server's name."""

    SLOW_DOWN = "503 SlowDown"
    INTERNAL_ERROR = "500 InternalError"
    NOT_IMPLEMENTED = "501 NotImplemented"
    ACCESS_DENIED = "403 AccessDenied"
    CONFLICT = "409 ConditionalRequestConflict"
    RESET = "the connection is reset before the server sees the request"
    LOST_REPLY = "the server does its work and the reply is lost"
    CUT_ERROR = "an error reply ends in its middle"
    CUT_CHUNKS = "an error reply in chunks ends in its middle"
    CUT_BODY = "the reply ends in its middle"
    SHORT_BODY = "the reply ends early and in order"
    STALL = "no reply ever comes"
    SLOW = "the reply takes its time"


Choose = Callable[[str, str], Fault | None]
"""Function from method and path of a request to its fault."""

Refuse = Callable[[str, Mapping[str, str]], str | None]
"""Function from method and headers of a request to the refusal of a server without that feature."""


def once(method: str, *faults: Fault) -> Choose:
    """Inject each fault into one request of this method, in order; later requests pass."""
    left = list(faults)
    lock = threading.Lock()

    def choose(asked: str, _path: str) -> Fault | None:
        with lock:
            return left.pop(0) if left and asked == method else None

    return choose


class FaultProxy:
    """Proxy that listens on ``url`` and passes requests on to ``upstream``; ``seen`` lists methods with their faults.

    ``rewrite`` changes what readers get, as a server does that optimises pictures on their way. ``refuse`` answers a
    request by its method and lower-case headers with "STATUS CODE message", as a server without a feature does.
    """

    def __init__(
        self,
        upstream: str,
        choose: Choose = lambda _method, _path: None,
        rewrite: Callable[[bytes], bytes] = lambda data: data,
        refuse: Refuse = lambda _method, _headers: None,
    ) -> None:
        self.rewrite = rewrite
        self.refuse = refuse
        self.refused: list[str] = []
        self.seen: list[tuple[str, Fault | None]] = []
        self.stopping = threading.Event()
        self.choose = choose
        parts = urlsplit(upstream)
        self.upstream = (parts.hostname or "", parts.port or 80)
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a kept-alive connection would delay the test
    proxy: FaultProxy

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore broken connections: this server causes them."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        """Handle any method: the fault first, then the rest of the exchange."""
        proxy = self.server.proxy
        fault = proxy.choose(self.command, self.path)
        proxy.seen.append((self.command, fault))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        refusal = proxy.refuse(self.command, {name.lower(): value for name, value in self.headers.items()})
        if refusal is not None:
            proxy.refused.append(refusal)
            self._answer(refusal)
        elif fault is Fault.STALL:
            proxy.stopping.wait()
        elif fault is Fault.RESET:
            self._reset()
        elif fault is Fault.CUT_ERROR:
            self._send(403, [("Content-Type", "application/xml"), ("Content-Length", "500")], b"<Error><Code>Acc")
            self._reset()
        elif fault is Fault.CUT_CHUNKS:
            self._send(403, [("Transfer-Encoding", "chunked")], b"1f4\r\n<Error><Code>Acc")
            self._reset()
        elif fault and fault[:3].isdigit():
            self._answer(fault)
        else:
            if fault is Fault.SLOW:
                proxy.stopping.wait(SLOW_S)
            self._pass_on(body, fault)

    do_PUT = do_POST = do_HEAD = do_DELETE = do_GET  # noqa: N815 - names that http.server looks for

    def log_message(self, *_: object) -> None:
        """Log nothing: tests read ``seen``."""

    def _pass_on(self, body: bytes, fault: Fault | None) -> None:
        proxy = self.server.proxy
        connection = http.client.HTTPConnection(*self.server.proxy.upstream, timeout=30)
        connection.request(self.command, self.path, body, dict(self.headers) | {"Connection": "close"})
        reply = connection.getresponse()
        data = reply.read()
        connection.close()
        if fault is Fault.LOST_REPLY:
            self._reset()
            return
        headers = [pair for pair in reply.getheaders() if pair[0].lower() not in ("transfer-encoding", "connection")]
        if self.command == "GET" and (rewritten := proxy.rewrite(data)) != data:
            data = rewritten
            about_data = ("content-length", "x-amz-checksum")
            headers = [pair for pair in headers if not pair[0].lower().startswith(about_data)]
        if not any(name.lower() == "content-length" for name, _ in headers):
            headers.append(("Content-Length", str(len(data))))
        half = fault in {Fault.CUT_BODY, Fault.SHORT_BODY}
        self._send(reply.status, headers, data[: len(data) // 2] if half else data)
        if fault is Fault.CUT_BODY:
            self._reset()
        elif fault is Fault.SHORT_BODY:
            self.close_connection = True

    def _answer(self, fault: str) -> None:
        status, code, message = (*fault.split(" ", 2), "injected")[:3]
        about, data = "application/xml", f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        if code.startswith(("<", "{")):
            about, data = "text/html" if code[0] == "<" else "application/x-amz-json-1.1", f"{code} {message}".encode()
        if status == "304":
            data = b""
        body = b"" if self.command == "HEAD" else data
        self._send(int(status), [("Content-Type", about), ("Content-Length", str(len(data)))], body)

    def _send(self, status: int, headers: Iterable[tuple[str, str]], data: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()

    def _reset(self) -> None:
        # With a linger time of zero, close() sends RST instead of an orderly end.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RD)

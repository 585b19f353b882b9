"""Reverse proxy in front of the Prefect API: a credential for each role, and an allow-list of routes.

This is a small application because no configuration of a stock proxy suffices. It inspects bodies (``job_variables``,
``pull_steps``, results) and asks the server which work pool a run belongs to. It filters events one by one on a
WebSocket that authenticates by its first message. The rules are in ``gateway_rules``; anything they do not name is
refused. Only the gateway holds Prefect's password (``PREFECT_API_AUTH_STRING``).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import httpx
import structlog
import uvicorn
import websockets
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from sdpipeline.orchestration.gateway_rules import (
    DISPATCHER,
    WORKER,
    Owners,
    RefusedError,
    Role,
    check,
    check_event,
    may_see,
)

if TYPE_CHECKING:
    from starlette.requests import Request

MAX_BYTES = 4 * 1024 * 1024
"""Largest body: an artifact holds a picture of up to 2 MB, and its base64 is longer."""
TIMEOUT_S = 60.0
POLICY_VIOLATION = 1008
SERVER_LOST = 1012

# Headers that Prefect's client sends and understands; all others are dropped, Authorization above all.
_PASSED_ON = ("content-type", "accept", "user-agent", "traceparent", "prefect-csrf-token", "prefect-csrf-client")
_ANSWERED = ("content-type", "retry-after", "prefect-maintenance")

log = structlog.get_logger(__name__)


class Gateway:
    """Check credential and request, then forward to the Prefect server with the server's own password."""

    def __init__(self, api_url: str, *, server_auth: str | None, credentials: Mapping[str, Role]) -> None:
        """Take the server's ``api_url`` and ``credentials``, which map USER:PASSWORD strings to roles."""
        self._api_url = api_url.rstrip("/")
        self._server_auth = server_auth
        self._credentials = [(text.encode(), role) for text, role in credentials.items()]
        headers = {"authorization": f"Basic {_encoded(server_auth)}"} if server_auth else {}
        self.server = httpx.AsyncClient(
            base_url=f"{self._api_url}/", headers=headers, timeout=TIMEOUT_S, follow_redirects=False, trust_env=False
        )
        self._owners = Owners(self.server)

    def role(self, given: str | None) -> Role | None:
        """Return the role of a USER:PASSWORD string; all are compared, in constant time."""
        found = None
        for known, role in self._credentials:
            if hmac.compare_digest(known, (given or "").encode(errors="replace")):
                found = role
        return found

    async def http(self, request: Request) -> Response:
        """Forward one request, or refuse it."""
        path = str(request.scope["path"]).removeprefix("/api")
        if request.method == "GET" and path == "/health":  # for probes, as on the server itself
            return await self._forwarded(request, path, None)
        role = self.role(_decoded(request.headers.get("authorization")))
        if role is None:
            log.warning("gateway_unauthorized", method=request.method, path=path)
            return JSONResponse({"exception_message": "Unauthorized"}, status_code=httpx.codes.UNAUTHORIZED)
        try:
            body = await _json(request)
            await check(role, self._owners, request.method, path, body)
            return await self._forwarded(request, path, body)
        except RefusedError as refused:
            log.warning("gateway_refused", role=role.name, method=request.method, path=path, reason=str(refused))
            return JSONResponse({"detail": str(refused)}, status_code=httpx.codes.FORBIDDEN)
        except httpx.HTTPError as error:
            log.warning("prefect_unavailable", error=repr(error))
            return JSONResponse({"detail": "the Prefect server does not answer"}, status_code=503)

    async def _forwarded(self, request: Request, path: str, body: Any) -> Response:
        """Send only the checked request: the parsed body is serialised anew, so that the server cannot read it
        differently."""
        headers = {name: request.headers[name] for name in _PASSED_ON if name in request.headers}
        query = {"client": request.query_params["client"]} if path == "/csrf-token" and request.query_params else None
        content = None if body is None else json.dumps(body).encode()
        sent = await self.server.request(
            request.method, path.removeprefix("/"), content=content, headers=headers, params=query
        )
        kept = {name: sent.headers[name] for name in _ANSWERED if name in sent.headers}
        return Response(sent.content, status_code=sent.status_code, headers=kept)

    async def events_in(self, socket: WebSocket) -> None:
        """Forward the events that a client emits, each one checked."""
        if (role := await self._accepted(socket)) is None:
            return

        async def forward(server: websockets.ClientConnection) -> None:
            async for text in socket.iter_text():
                try:
                    event = _parsed(text)
                    await check_event(role, self._owners, event)
                except RefusedError as refused:
                    log.warning("gateway_refused", role=role.name, path="/events/in", reason=str(refused))
                    continue
                await server.send(json.dumps(event))

        await self._joined(socket, "events/in", forward, _drained)

    async def events_out(self, socket: WebSocket) -> None:
        """Forward the events that a client asked for, if they are about its own runs."""
        if (role := await self._accepted(socket)) is None:
            return

        async def ask(server: websockets.ClientConnection) -> None:
            async for text in socket.iter_text():
                await server.send(text)

        async def answer(server: websockets.ClientConnection) -> None:
            async for message in server:
                if await may_see(role, self._owners, _parsed(message)):
                    await socket.send_text(str(message))

        await self._joined(socket, "events/out", ask, answer)

    async def _accepted(self, socket: WebSocket) -> Role | None:
        """Perform Prefect's handshake: the first message carries the credential."""
        await socket.accept(subprotocol="prefect" if "prefect" in socket.scope["subprotocols"] else None)
        try:
            first = _parsed(await asyncio.wait_for(socket.receive_text(), TIMEOUT_S))
            role = self.role(str(first.get("token"))) if first.get("type") == "auth" else None
        except (RefusedError, AttributeError, KeyError, TimeoutError):
            role = None
        except WebSocketDisconnect:
            return None
        if role is None:
            await socket.close(POLICY_VIOLATION, reason="Invalid token")
            return None
        await socket.send_json({"type": "auth_success"})
        return role

    async def _joined(self, socket: WebSocket, path: str, *ways: Any) -> None:
        """Run both directions until one side ends; the client is told to reconnect."""
        url = f"{self._api_url.replace('http', 'ws', 1)}/{path}"
        try:
            async with websockets.connect(
                url, subprotocols=[websockets.Subprotocol("prefect")], proxy=None, max_size=MAX_BYTES
            ) as server:
                await server.send(json.dumps({"type": "auth", "token": self._server_auth}))
                if _parsed(await server.recv()).get("type") == "auth_success":
                    await _first_to_end(*(way(server) for way in ways))
        except (OSError, websockets.WebSocketException, httpx.HTTPError, RefusedError) as error:
            log.warning("prefect_unavailable", path=path, error=repr(error))
        with suppress(RuntimeError, WebSocketDisconnect):  # the client is gone already
            await socket.close(SERVER_LOST, reason="the connection to the Prefect server ended")


def application(gateway: Gateway) -> Starlette:
    """Return the application: two WebSockets and a catch-all route, each checked by the rules."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await gateway.server.aclose()

    routes = [
        WebSocketRoute("/api/events/in", gateway.events_in),
        WebSocketRoute("/api/events/out", gateway.events_out),
        Route("/api/{path:path}", gateway.http, methods=["GET", "POST", "PATCH", "PUT", "DELETE"]),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


def serve(api_url: str, *, server_auth: str | None, auths: Mapping[str, str], host: str, port: int) -> None:
    """Serve until SIGTERM or Ctrl-C; ``auths`` maps role names to USER:PASSWORD."""
    credentials = {auths[role.name]: role for role in (WORKER, DISPATCHER)}
    gateway = Gateway(api_url, server_auth=server_auth, credentials=credentials)
    uvicorn.run(application(gateway), host=host, port=port, log_level="warning", ws_max_size=MAX_BYTES)


async def _first_to_end(*ways: Any) -> None:
    tasks = [asyncio.ensure_future(way) for way in ways]
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    for task in done:
        if (error := task.exception()) is not None and not isinstance(error, WebSocketDisconnect):
            raise error


async def _drained(server: websockets.ClientConnection) -> None:
    async for _ in server:
        pass


async def _json(request: Request) -> Any:
    """Return the parsed body; None if there is none."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BYTES:
            raise RefusedError(f"the body is larger than {MAX_BYTES} bytes")
    return _parsed(bytes(data)) if data else None


def _parsed(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RefusedError("the body is not JSON") from error


def _encoded(auth: str) -> str:
    return base64.b64encode(auth.encode()).decode()


def _decoded(header: str | None) -> str | None:
    scheme, _, encoded = (header or "").partition(" ")
    try:
        return base64.b64decode(encoded, validate=True).decode() if scheme.lower() == "basic" else None
    except (binascii.Error, UnicodeDecodeError):
        return None

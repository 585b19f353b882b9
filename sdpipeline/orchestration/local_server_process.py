"""Process of a home's own Prefect server, which serves only its own pages and clients on this machine.

Started by ``sdpipeline/orchestration/local_server.py``, which binds the port. Ends when no command uses it any more.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
from starlette.datastructures import Headers
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse

from sdpipeline.orchestration.local_server import STOP_TIMEOUT_S, Process, wait_until_unused

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

HOSTS = ["127.0.0.1", "localhost"]
GRACE_S = 2


class SameOrigin:
    """ASGI middleware that refuses requests and WebSockets from pages of another origin.

    Clients other than browsers send no origin.
    """

    def __init__(self, app: ASGIApp, origins: frozenset[str]) -> None:
        self._app = app
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] in {"http", "websocket"}:
            origin = Headers(scope=scope).get("origin")
            if origin is not None and origin not in self._origins:
                await PlainTextResponse("Foreign origin", status_code=403)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def main() -> None:
    """Serve on the inherited socket until no command uses this server."""
    os.umask(0o077)
    about = json.loads(sys.argv[1])
    listener = socket.socket(fileno=about["listener"])
    server = uvicorn.Server(_configuration(listener.getsockname()[1]))
    starter = Process(**about["starter"])
    watch = threading.Thread(
        target=_end_when_unused, args=(server, Path(about["folder"]), starter), name="users", daemon=True
    )
    watch.start()
    server.run(sockets=[listener])


def _configuration(port: int) -> uvicorn.Config:
    """Configure the server that `prefect server start` runs, behind two checks."""
    from prefect.server.api.server import create_app
    from prefect.settings import get_current_settings

    settings = get_current_settings().server
    origins = frozenset(f"http://{host}:{port}" for host in HOSTS)
    app = TrustedHostMiddleware(SameOrigin(create_app(final=True), origins), HOSTS, www_redirect=False)
    return uvicorn.Config(
        app,
        timeout_keep_alive=settings.api.keepalive_timeout,
        timeout_graceful_shutdown=GRACE_S,
        ws_ping_interval=settings.api.websocket_ping_interval,
        ws_ping_timeout=settings.api.websocket_ping_timeout,
        log_level=settings.logging_level.lower(),
        proxy_headers=False,
    )


def _end_when_unused(server: uvicorn.Server, folder: Path, starter: Process) -> None:
    """End the server when no command uses it: a command that was killed cannot stop it."""
    lock = wait_until_unused(folder, Process.of(os.getpid()), starter)
    server.should_exit = True
    time.sleep(STOP_TIMEOUT_S)
    del lock  # held until here
    os.killpg(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()

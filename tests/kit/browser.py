"""A headless Chromium that tests drive by its DevTools protocol, over a pair of pipes: no library, no port."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import subprocess
import time
from pathlib import Path
from typing import Any

from kit.patience import SOON

ARGUMENTS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe"]


class Browser:
    """One browser with one page.

    Args:
        arguments: more of them for the program.

    Attributes:
        complaints: errors and warnings of the page's console, violations of its policy among them.
    """

    def __init__(self, folder: Path, *arguments: str) -> None:
        self._login: tuple[str, str] | None = None
        self.complaints: list[str] = []
        self._last = 0
        self._inbox = b""
        theirs_in, self._to = os.pipe()
        self._from, theirs_out = os.pipe()
        # The browser reads from descriptor 3 and writes to 4: these must be others, or one would replace the other.
        passed = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs_in, theirs_out)]
        try:
            script = f'exec chromium "$@" 3<&{passed[0]} 4>&{passed[1]}'
            self._process = subprocess.Popen(
                ["bash", "-c", script, "chromium", *ARGUMENTS, *arguments, f"--user-data-dir={folder}", "about:blank"],
                pass_fds=passed,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        finally:
            for fd in (theirs_in, theirs_out, *passed):
                os.close(fd)
        self._session = ""
        page = self.do("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.do("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.do(f"{domain}.enable")

    def log_in(self, user: str, password: str) -> None:
        """Give these to whoever asks, as a user would."""
        self._login = (user, password)
        self.do("Fetch.enable", handleAuthRequests=True)

    def show(self, width: int, height: int, scheme: str) -> None:
        """The size of the window, in CSS pixels, and "light" or "dark"."""
        self.do(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.do("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def open(self, url: str) -> None:
        self.do("Page.navigate", url=url)
        self.wait_for(f"location.href == {json.dumps(url)} && document.readyState == 'complete'")

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives."""
        result = self.do("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for(self, expression: str) -> Any:
        """Waits until it gives something true."""
        give_up = time.monotonic() + SOON
        while not (value := self.value(expression)):
            assert time.monotonic() < give_up, (expression, self.value("document.body.innerText"), self.complaints)
            time.sleep(0.05)
        return value

    def screenshot(self, path: Path | str, *, whole: bool = False) -> None:
        data = self.do("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        Path(path).write_bytes(base64.b64decode(data))

    def do(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = self._send(method, **parameters)
        while (answer := self._receive()).get("id") != number:
            if answer.get("method") == "Log.entryAdded":
                self.complaints.append(answer["params"]["entry"]["text"])
            elif answer.get("method") == "Runtime.exceptionThrown":
                self.complaints.append(str(answer["params"]["exceptionDetails"]))
            elif answer.get("method") == "Fetch.requestPaused":
                self._send("Fetch.continueRequest", requestId=answer["params"]["requestId"])
            elif answer.get("method") == "Fetch.authRequired" and self._login is not None:
                given = {"response": "ProvideCredentials", "username": self._login[0], "password": self._login[1]}
                self._send(
                    "Fetch.continueWithAuth", requestId=answer["params"]["requestId"], authChallengeResponse=given
                )
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def _send(self, method: str, **parameters: Any) -> int:
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        return self._last

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._inbox:
            assert select.select([self._from], [], [], SOON)[0], "the browser is silent"
            data = os.read(self._from, 1 << 20)
            assert data, "the browser has ended"
            self._inbox += data
        message, _, self._inbox = self._inbox.partition(b"\0")
        return json.loads(message)

    def close(self) -> None:
        os.close(self._to)
        os.close(self._from)
        try:
            self._process.wait(SOON)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

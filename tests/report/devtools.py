"""A headless Chromium that a test speaks to through its DevTools pipe: what it asked for, what its console said, what it shows."""

from __future__ import annotations

import base64
import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

OPTIONS = (
    "--headless=new --no-sandbox --disable-gpu --disable-background-networking --no-first-run --disable-sync "
    "--disable-component-update --disable-dev-shm-usage --hide-scrollbars --remote-debugging-pipe"
)
ANSWER_S = 120
# the browser reads commands from descriptor 3 and answers on 4
LAUNCH = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
os.dup2(ends[0], 3), os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """A running browser; `page` opens a page in it."""

    def __init__(self, program: str, profile: Path) -> None:
        read, self._write = os.pipe()
        self._read, write = os.pipe()
        command = [program, *OPTIONS.split(), f"--user-data-dir={profile}"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, str(read), str(write), *command],
            pass_fds=(read, write),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read)
        os.close(write)
        self._rest, self._count = b"", 0
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.send("Browser.close")
        finally:
            os.close(self._write)
            os.close(self._read)
            try:
                self._process.wait(ANSWER_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def send(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Give a command and return its answer; events that came before it are kept."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self._count:
                assert "error" not in found, (method, found["error"])
                return found["result"]
            self.events.append(found)

    def wait_for(self, method: str, session: str) -> None:
        """Read until an event has come."""
        while not any(one["method"] == method and one.get("sessionId") == session for one in self.events):
            self.events.append(self._next())

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._read], [], [], ANSWER_S)[0], f"the browser said nothing for {ANSWER_S} s"
            data = os.read(self._read, 1 << 16)
            assert data, "the browser ended"
            self._rest += data
        text, _, self._rest = self._rest.partition(b"\0")
        return json.loads(text)

    def page(self, address: str, *, width: int = 1200, dark: bool = False, script: bool = True) -> Page:
        """Open `address` in a page of its own, and wait until it is loaded and painted."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.send(f"{domain}.enable")
        page.size(width)
        page.scheme("dark" if dark else "light")
        page.send("Emulation.setScriptExecutionDisabled", value=not script)
        page.send("Page.navigate", url=address)
        self.wait_for("Page.loadEventFired", session)
        if script:
            page.settle()
        return page


class Page:
    """One page of the browser."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """A command to this page."""
        return self._browser.send(method, self._session, **params)

    def size(self, width: int, height: int = 1600) -> None:
        """A window of that many CSS pixels; below 600 it is a phone's."""
        phone = width < 600
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )

    def scheme(self, name: str) -> None:
        """`light` or `dark`."""
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def settle(self) -> None:
        """Wait for a few frames."""
        self.until("false", most=4)

    def until(self, expression: str, most: int = 2000) -> bool:
        """Wait until an expression is true, for so many frames at most; whether it is."""
        condition = f"({expression}) || tried++ >= {most}"
        step = f"() => {condition} ? done({expression}) : requestAnimationFrame(step)"
        return bool(self.value(f"new Promise((done) => {{ let tried = 0; const step = {step}; step(); }})"))

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript is."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def move(self, x: float, y: float) -> None:
        """Put the pointer there, in pixels of the window."""
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self.settle()

    def picture(self, path: Path) -> bytes:
        """A PNG of what the window shows, also written to `path`."""
        data = base64.b64decode(self.send("Page.captureScreenshot")["data"])
        path.write_bytes(data)
        return data

    @property
    def console(self) -> list[str]:
        """Everything the console said: messages, errors, refusals of the policy."""
        said = []
        for event in self._mine():
            params = event["params"]
            if event["method"] == "Runtime.consoleAPICalled":
                said.append(" ".join(str(one.get("value", one.get("description"))) for one in params["args"]))
            elif event["method"] == "Runtime.exceptionThrown":
                said.append(json.dumps(params["exceptionDetails"]))
            elif event["method"] == "Log.entryAdded":
                said.append(params["entry"]["text"])
        return said

    @property
    def requests(self) -> list[str]:
        """Every address that was asked for."""
        return [one["params"]["request"]["url"] for one in self._mine() if one["method"] == "Network.requestWillBeSent"]

    def _mine(self) -> list[dict[str, Any]]:
        self.value("1")
        return [one for one in self._browser.events if one.get("sessionId") == self._session]

"""A headless Chromium that tests drive: the DevTools protocol over two pipes."""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import time
from pathlib import Path
from typing import Any

EXECUTABLE = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser", "chrome"))), None)
SECONDS = 30.0  # the most that anything may take
FLAGS = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --disable-background-networking"


class Browser:
    """One process with one tab; its profile and what it prints go to `folder`.

    `problems` holds what pages wrote to the console and exceptions they raised, `requests` the addresses they asked
    for, both since the last `open`.
    """

    def __init__(self, folder: Path) -> None:
        assert EXECUTABLE is not None
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._contexts: dict[str, int] = {}  # where a frame's scripts run
        self._buffer = b""
        self._last_id = 0
        self._session: dict[str, str] = {}
        # The browser reads from its file 3 and writes to its file 4: numbers from 20 are not in their way.
        read, self._write = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 20) for end in os.pipe())
        self._read, write = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 20) for end in os.pipe())
        printed = os.open(folder / "printed.log", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        command = [EXECUTABLE, *FLAGS.split(), "--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}"]
        targets = [(read, 3), (write, 4), (printed, 1), (printed, 2)]
        actions = [(os.POSIX_SPAWN_DUP2, mine, theirs) for mine, theirs in targets]
        self._pid = os.posix_spawn(EXECUTABLE, command, os.environ, file_actions=actions)
        for end in (read, write, printed):
            os.close(end)
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def close(self) -> None:
        """Ask the process to end, and end it by its own id if it does not."""
        self._session = {}
        self.send("Browser.close")
        deadline = time.monotonic() + 5
        while not (ended := os.waitpid(self._pid, os.WNOHANG)[0]) and time.monotonic() < deadline:
            time.sleep(0.02)
        if not ended:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        os.close(self._read)
        os.close(self._write)

    # -- what tests do -------------------------------------------------------------------------------------------

    def open(self, url: str) -> None:
        """Go to an address, from another page, and wait until everything is loaded."""
        self.send("Page.navigate", url="about:blank")
        self.problems.clear()
        self.requests.clear()
        self.send("Page.navigate", url=url)
        self.wait("location.href !== 'about:blank' && document.readyState === 'complete'")

    def evaluate(self, expression: str, frame: str = "") -> Any:
        """The value of an expression, in the page or in that frame whose address contains `frame`."""
        where = {"contextId": self._contexts[self._frame(frame)]} if frame else {}
        reply = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, **where)
        if "exceptionDetails" in reply:
            raise AssertionError(f"{expression}: {reply['exceptionDetails']}")
        return reply["result"].get("value")

    def texts(self, selector: str) -> list[str]:
        """The texts of all elements that a selector finds."""
        texts: list[str] = self.evaluate(
            f"[...document.querySelectorAll({json.dumps(selector)})].map(each => each.textContent)"
        )
        return texts

    def cards(self) -> list[int]:
        """The numbers of the cards that are drawn, from above."""
        return [int(text.removeprefix("#")) for text in self.texts("article header a")]

    def wait(self, expression: str, frame: str = "") -> None:
        """Until an expression is true."""
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                if self.evaluate(expression, frame):
                    return
            except (KeyError, StopIteration, RuntimeError):  # the frame is being loaded
                pass
            assert time.monotonic() < deadline, f"never true: {expression}"
            time.sleep(0.01)

    def click(self, selector: str) -> None:
        """A real click on the middle of an element."""
        for kind in ("mousePressed", "mouseReleased"):
            self._mouse(kind, selector, button="left", clickCount=1)

    def hover(self, selector: str) -> None:
        """Move the pointer onto an element."""
        self._mouse("mouseMoved", selector)

    def press(self, key: str) -> None:
        """A key such as `ArrowRight`."""
        codes = {"ArrowLeft": 37, "ArrowRight": 39, "Escape": 27, "Tab": 9}
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key])

    def look(self, scheme: str = "light", width: int = 1280, height: int = 900) -> None:
        """Set colour scheme and size of the window."""
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", **size)

    def screenshot(self, path: Path) -> None:
        """Save what the window shows."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))

    # -- the protocol --------------------------------------------------------------------------------------------

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return what comes back."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": params} | self._session
        left = json.dumps(message).encode() + b"\0"
        while left:
            left = left[os.write(self._write, left) :]
        while True:
            reply = self._receive()
            if reply.get("id") == self._last_id:
                if "error" in reply:
                    raise RuntimeError(f"{method}: {reply['error']['message']}")
                return reply["result"]

    def _receive(self) -> dict[str, Any]:
        """The next message; noted if it is an event."""
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], SECONDS)[0]:
                raise TimeoutError(f"The browser said nothing for {SECONDS:.0f} s.")
            received = os.read(self._read, 1 << 20)
            if not received:
                raise EOFError("The browser has ended.")
            self._buffer += received
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        params = message.get("params", {})
        match message.get("method"):
            case "Runtime.executionContextCreated":
                context = params["context"]
                if context["auxData"]["isDefault"]:
                    self._contexts[context["auxData"]["frameId"]] = context["id"]
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Runtime.consoleAPICalled":
                self.problems.append(str([argument.get("value") for argument in params["args"]]))
            case "Runtime.exceptionThrown":
                self.problems.append(str(params["exceptionDetails"]))
            case "Log.entryAdded":
                self.problems.append(params["entry"]["text"])
        return message

    def _frame(self, part: str) -> str:
        tree = self.send("Page.getFrameTree")["frameTree"]
        return next(child["frame"]["id"] for child in tree.get("childFrames", ()) if part in child["frame"]["url"])

    def _mouse(self, kind: str, selector: str, **params: Any) -> None:
        x, y = self.evaluate(
            f"(() => {{ const element = document.querySelector({json.dumps(selector)});"
            "element.scrollIntoView({block: 'center'}); const box = element.getClientRects()[0];"
            "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **params)

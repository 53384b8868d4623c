"""A real browser, driven over a pipe: what a page's own JavaScript does, seen from outside."""

import base64
import json
import os
import selectors
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-extensions",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe",
]  # fmt: skip


class Browser:
    """One page of a headless Chromium, by its DevTools protocol: JSON between two pipes, a zero byte after each.

    `errors` are what the console and the page complained of, `requests` every address that was asked for.
    """

    def __init__(self, program: str, profile: Path) -> None:
        import fcntl  # of POSIX only

        read_commands, self.commands = os.pipe()
        self.answers, write_answers = os.pipe()

        def pipes() -> None:  # Chromium reads commands from descriptor 3 and answers on 4
            high = fcntl.fcntl(read_commands, fcntl.F_DUPFD, 10), fcntl.fcntl(write_answers, fcntl.F_DUPFD, 10)
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        words = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(words, preexec_fn=pipes, close_fds=False, start_new_session=True, **quiet)
        os.close(read_commands)
        os.close(write_answers)
        self.waiting = selectors.DefaultSelector()
        self.waiting.register(self.answers, selectors.EVENT_READ)
        self.number, self.buffer, self.session = 0, b"", ""
        self.errors: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for part in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{part}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command and wait for its answer."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self.number:
            self._event(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + 60
        while b"\0" not in self.buffer:
            assert self.waiting.select(max(0.0, end - time.monotonic())), "the browser does not answer"
            block = os.read(self.answers, 1 << 16)
            assert block, "the browser has ended"
            self.buffer += block
        first, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(first)

    def _event(self, event: dict[str, Any]) -> None:
        method, told = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.errors.append(json.dumps(told))

    def open(self, path: Path, width: int = 1400, height: int = 1000, dark: bool = False) -> None:
        """Show a file and wait until its script has set data-ready on the body."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.theme(dark)
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.until("document.body && document.body.dataset.ready === 'yes'")

    def theme(self, dark: bool) -> None:
        """Prefer dark or light."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, script: str) -> None:
        """Wait until the expression is true."""
        end = time.monotonic() + 60
        while not self.run(script):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.02)

    def place(self, selector: str, number: int = 0) -> tuple[float, float]:
        """Scroll the element into view and give its middle."""
        script = f"document.querySelectorAll({json.dumps(selector)})[{number}]"
        self.run(f"{script}.scrollIntoView({{block: 'nearest', inline: 'nearest'}})")
        box = self.run(
            f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({script}.getBoundingClientRect())"
        )
        return box[0], box[1]

    def hover(self, selector: str, number: int = 0) -> None:
        """Move the mouse over an element."""
        x, y = self.place(selector, number)
        self.move(x, y)

    def move(self, x: float, y: float) -> None:
        """Move the mouse."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str, number: int = 0) -> None:
        """Click on an element with the mouse."""
        x, y = self.place(selector, number)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str) -> None:
        """Press and release a key that has no character, such as ArrowLeft."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def picture(self, path: Path) -> None:
        """A screenshot as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        """End the browser and all its processes."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.waiting.close()
        os.close(self.commands)
        os.close(self.answers)


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all tests; they are skipped where there is none."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None or os.name != "posix":
        pytest.skip("needs Chromium or Chrome on the PATH, on a POSIX system")
    browser = Browser(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium: Browser) -> Browser:
    """The browser with an empty page, and nothing to complain of yet."""
    chromium.call("Page.navigate", url="about:blank")
    chromium.until("location.href === 'about:blank' && document.readyState === 'complete'")
    chromium.errors.clear()
    chromium.requests.clear()
    return chromium

"""A real browser, driven over a pipe, which sees from outside what a page's own JavaScript does; data for pages."""

import base64
import html.parser
import json
import os
import selectors
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quire.inspection.calls import Call, Forward, Provenance, watched
from quire.inspection.written import code, derivation, equation
from quire.layers.layer import recording
from quire.models import MODELS
from quire.plots.gradients_page import GraphNode

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


@pytest.fixture
def in_page() -> Callable[[Path], dict]:
    """What gives the data of a page, as a browser's parser finds it."""

    class Parser(html.parser.HTMLParser):
        inside, found = False, ""

        def handle_starttag(self, tag: str, attrs: list) -> None:
            self.inside = tag == "script" and ("id", "data") in attrs

        def handle_data(self, data: str) -> None:
            self.found += data if self.inside else ""

        def handle_endtag(self, tag: str) -> None:
            self.inside = False

    def data(path: Path) -> dict:
        parser = Parser()
        parser.feed(path.read_text(encoding="utf-8"))
        return json.loads(parser.found)

    return data


# ---- the calls of a real model ----

SIZES = {"vocabulary_size": 11, "context_length": 32, "embedding_size": 16, "layers": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "gpt": {"heads": 2},
    "turned": {"kind": "gpt", "heads": 2, "positions": "rotary", "qk_norm": True, "feedforward": "swiglu"},
    "post": {"kind": "gpt", "heads": 2, "norm_placement": "post"},
    "recurrent": {},
    "encoder-decoder": {"heads": 2, "feedforward_size": 32, "separator": 0},
}


def recorded(shape: str = "gpt", wrong: str = "", **settings: Any) -> list[GraphNode]:
    """The calls of a real model's forward pass; what is told of gradients is made up, and of `wrong` it is bad."""
    words = SIZES | SHAPES[shape] | settings
    kind = MODELS[words.pop("kind", shape)]
    torch.manual_seed(1)
    model = kind(kind.Settings(**words))
    tokens = torch.arange(10)[None]
    source = {"source": tokens} if model.settings.reads_source else {}
    forward = Forward(model)
    with torch.no_grad(), recording(model), watched(model, "forward", forward.call), Provenance():
        model(tokens, tokens.roll(-1), **source)
    return [_node(call, wrong) for call in forward.calls]


def _node(call: Call, wrong: str) -> GraphNode:
    inside = bool(wrong) and (not call.name or wrong.startswith(call.name + "."))
    kind = type(call.layer)
    return GraphNode(
        number=call.number,
        name=call.name,
        layer=kind.__name__,
        parent=call.parent,
        sources=tuple(sorted(source for source in call.sources if source >= 0)),
        equation=equation(kind),
        derivation=derivation(kind),
        forward_code=code(kind, "forward"),
        backward_code=code(kind, "backward"),
        inputs=", ".join(map(str, call.shapes)),
        output=" ".join(map(str, call.outputs)),
        activation_norm=call.norm,
        gradient_norm=0.1 / (call.number + 1),
        returned_norm=None if call.number % 5 == 1 else 0.2,
        autograd_difference=1.75 if call.name == wrong else 3.1e-16,
        numerical_difference=1.5 if call.name == wrong else 2.2e-9,
        verdict="wrong" if wrong and call.name == wrong else "within" if inside else "agrees",
        parameters=tuple(
            (n, str(tuple(p.shape)), float(p.detach().norm()), 0.5) for n, p in call.layer.named_parameters("", False)
        ),
        activation_picture=call.picture,
        gradient_picture=call.picture,
    )


@pytest.fixture
def calls() -> Callable[..., list[GraphNode]]:
    """What gives the calls of a model of some shape."""
    return recorded

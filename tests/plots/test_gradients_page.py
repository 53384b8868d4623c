"""The page of one forward and one backward pass: what is in it, and what it does in a real browser."""

import base64
import dataclasses
import json
import math
import textwrap
from pathlib import Path

import numpy as np
import pytest

from quire.plots.gradients_page import GraphNode, write_gradients_page

TOKENS = ["To", " be", "\n", "<script>alert(1)</script>", "</script>", "\"'&amp;", "שלום", "😀", "\u202e", "<!--"]
SHAPES = ("gpt", "turned", "post", "recurrent", "encoder-decoder")


def page(path: Path, nodes: list[GraphNode]) -> list[GraphNode]:
    write_gradients_page(path, 'runs/<i>&"__DATA__', TOKENS, 3.21643, nodes)
    return nodes


def leaves(nodes: list[GraphNode]) -> list[GraphNode]:
    callers = {node.parent for node in nodes}
    return [node for node in nodes if node.number not in callers]


# ---- without a browser ----


def test_what_is_told_of_a_call_comes_back(tmp_path: Path, calls, in_page) -> None:
    nodes = page(tmp_path / "page.html", calls("turned"))
    data = in_page(tmp_path / "page.html")
    assert len(data["nodes"]) == len(nodes) and data["loss"] == 3.216
    assert len(data["texts"]) == len(set(data["texts"])), "what every block repeats is written once"
    for there, node in zip(data["nodes"], nodes):
        for name in ("number", "name", "layer", "parent", "inputs", "output", "verdict"):
            assert there[name] == getattr(node, name)
        for name in ("equation", "derivation", "forward_code", "backward_code"):
            assert data["texts"][there[name]] == getattr(node, name)
        assert there["sources"] == list(node.sources)
        assert there["activation_norm"] == pytest.approx(node.activation_norm, rel=1e-3)
        assert [[name, shape] for name, shape, _, _ in there["parameters"]] == [list(p[:2]) for p in node.parameters]


def test_a_picture_comes_back_and_a_large_one_keeps_what_stands_out(tmp_path: Path, calls, in_page) -> None:
    draw = np.random.default_rng(1)
    small, large = draw.exponential(size=(10, 16)), draw.random((200, 1000))
    large[150, 777] = 50.0
    node = calls()[-1]
    nodes = [
        dataclasses.replace(node, activation_picture=small.tolist(), gradient_picture=large.tolist()),
        dataclasses.replace(node, activation_picture=[], gradient_picture=[[math.nan, 2.0, math.inf]]),
        dataclasses.replace(node, activation_picture=[[0.0, 0.0]], gradient_picture=None),
    ]
    write_gradients_page(tmp_path / "page.html", "x", TOKENS, 1.0, nodes)

    def back(picture: dict) -> np.ndarray:
        bytes_ = np.frombuffer(base64.b64decode(picture["data"]), dtype=np.uint8).reshape(picture["size"])
        return picture["largest"] * (bytes_ / 255) ** 2

    first, second, third = in_page(tmp_path / "page.html")["nodes"]
    assert np.abs(back(first["activation_picture"]) - small).max() < 0.005 * small.max()
    pooled = back(first["gradient_picture"])
    assert first["gradient_picture"]["whole"] == [200, 1000] and pooled.shape == (64, 96)
    assert pooled.argmax() == 150 * 64 // 200 * 96 + 777 * 96 // 1000 and pooled.max() == 50
    assert second["activation_picture"] is None, "an empty one is none"
    assert back(second["gradient_picture"]).tolist() == [[0, 2, 0]], "what is not finite counts as nothing"
    assert back(third["activation_picture"]).tolist() == [[0, 0]]


def test_the_page_asks_nobody(tmp_path: Path, calls) -> None:
    page(tmp_path / "page.html", calls())
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    addresses = text.replace("http://www.w3.org/2000/svg", "")  # a name, never asked for
    assert "http:" not in addresses and "https:" not in addresses and "src=" not in text and "import(" not in text
    assert "default-src 'none'" in text
    assert text.count("<script") == 4 and text.count("</script>") == 4, "no token opens or ends a script"
    assert "<title>runs/&lt;i&gt;&amp;&quot;__DATA__</title>" in text


def test_twelve_blocks_fit_an_email(tmp_path: Path, calls) -> None:
    nodes = page(tmp_path / "page.html", calls(layers=12, embedding_size=64))
    assert len(nodes) == 187
    assert (tmp_path / "page.html").stat().st_size < 1_500_000


# ---- in a browser ----

NODES = "[...document.querySelectorAll('.call')]"
NOW = "calls[calls.findIndex(call => call === now.item)].name"
EDGES = "[...edges.values()].map(({ from, to }) => [from.name ?? from.kind, to.name ?? to.kind])"
PANEL = "document.querySelector('#panel').textContent"
SAID = "document.querySelector('#said').textContent"


def toggle(name: str) -> str:
    return f'[aria-label^="{name},"] .toggle'


def test_it_opens_with_the_blocks_closed(tmp_path: Path, calls, browser) -> None:
    nodes = page(tmp_path / "page.html", calls())
    browser.open(tmp_path / "page.html", height=800)
    model = nodes[0]
    assert browser.run(f"{NODES}.length") == 1 + sum(node.parent == model.number for node in nodes)
    assert browser.run("document.title") == 'runs/<i>&"__DATA__'
    assert browser.run(SAID) == "Step 1 of 16, forward"
    assert browser.run(EDGES) == [
        ["10 tokens", "token_embedding"],
        ["10 tokens", "positions"],
        ["token_embedding", "dropout"],
        ["positions", "dropout"],
        ["dropout", "blocks.0"],
        ["blocks.0", "blocks.1"],
        ["blocks.1", "norm"],
        ["norm", "head"],
        ["head", "loss"],
        ["loss", "loss 3.216"],
    ]
    assert (browser.errors, browser.requests) == ([], [(tmp_path / "page.html").as_uri()])


def test_boxes_open_and_close_and_the_stream_passes_them_by(tmp_path: Path, calls, browser) -> None:
    page(tmp_path / "page.html", calls())
    browser.open(tmp_path / "page.html", height=800)
    closed = browser.run(f"{NODES}.length")
    browser.click(toggle("blocks.0"))
    assert browser.run(f"{NODES}.length") == closed + 6
    found = browser.run(EDGES)
    assert ["dropout", "blocks.0.attention_norm"] in found and ["dropout", "sum"] in found, "past attention"
    assert ["blocks.0.dropout", "sum"] in found and ["sum", "blocks.0.feedforward_norm"] in found
    assert ["sum", "sum"] in found and ["sum", "blocks.1"] in found, "past the feedforward"
    browser.click(toggle("blocks.0.attention"))
    parts = [f"blocks.0.attention.{part}" for part in ("query", "key", "value")]
    found = browser.run(EDGES)
    for part in parts:
        assert ["blocks.0.attention_norm", part] in found and [part, "blocks.0.attention.attend"] in found
        browser.click(f'[aria-label^="{parts[1]},"]')
    assert browser.run(NOW) == parts[1]
    browser.click(toggle("blocks.0"))
    assert browser.run(NOW) == "blocks.0", "what was chosen within a box that closes is the box"
    assert browser.run(f"{NODES}.length") == closed
    browser.press("Enter")  # opens it again, as it was
    assert browser.run(f"{NODES}.length") == closed + 11
    assert browser.run("document.querySelector('.call.now').getAttribute('aria-expanded')") == "true"
    browser.press("Enter")
    assert browser.run(f"{NODES}.length") == closed
    assert browser.errors == []


def test_the_keyboard_walks_forward_and_backward(tmp_path: Path, calls, browser) -> None:
    nodes = page(tmp_path / "page.html", calls("turned", layers=1))
    browser.open(tmp_path / "page.html")
    browser.click("#open")
    assert browser.run(f"{NODES}.length") == len(nodes)
    order = [node.name for node in leaves(nodes)]
    seen, passes = [], []
    browser.press("Home")
    for _ in range(2 * len(order)):
        seen.append(browser.run(NOW))
        passes.append(browser.run("document.querySelector('#backward').getAttribute('aria-pressed')"))
        inside = "(box, frame) => box.top >= frame.top && box.bottom <= frame.bottom"
        boxes = "now.item.drawn.getBoundingClientRect(), document.querySelector('#frame').getBoundingClientRect()"
        browser.until(f"({inside})({boxes})")
        browser.press("ArrowRight")
    assert seen == [*order, *reversed(order)]
    assert passes == ["false"] * len(order) + ["true"] * len(order)
    assert browser.run(NOW) == order[0], "there is nothing after the last step"
    assert browser.run("document.querySelectorAll('.edge:not(.came)').length") == 0, "the gradient went everywhere"
    browser.press("Home")
    assert browser.run("document.querySelectorAll('.edge.came').length") == 0
    browser.press("ArrowLeft")
    assert browser.run(SAID) == f"Step 1 of {2 * len(order)}, forward"
    browser.press("ArrowRight")
    browser.press("b")
    assert browser.run(SAID) == f"Step {2 * len(order) - 1} of {2 * len(order)}, backward"
    browser.press("ArrowLeft")
    assert browser.run(NOW) == order[2], "back is the other way in the backward pass"
    browser.press("f")
    assert browser.run(SAID) == f"Step 3 of {2 * len(order)}, forward"
    browser.press("End")
    assert browser.run(NOW) == order[0]
    assert browser.errors == []


def test_the_walk_goes_into_an_open_box(tmp_path: Path, calls, browser) -> None:
    page(tmp_path / "page.html", calls())
    browser.open(tmp_path / "page.html", height=800)
    browser.run("calls.find(call => call.name === 'blocks.0').drawn.focus()")
    browser.click('[aria-label^="blocks.0,"]')
    browser.press(" ")
    for key, name in [("ArrowRight", "blocks.0.attention_norm"), ("ArrowRight", "blocks.0.attention")]:
        browser.press(key)
        assert browser.run(NOW) == name
    assert browser.run("document.activeElement === now.item.drawn"), "the focus goes along"
    browser.click('[aria-label^="blocks.0,"] > .heading')
    for key, name in [("b", "blocks.0"), ("ArrowRight", "blocks.0.dropout"), ("ArrowRight", "blocks.0.feedforward")]:
        browser.press(key)
        assert browser.run(NOW) == name
    assert browser.run("document.querySelectorAll('#graph [tabindex=\"0\"]').length") == 1
    assert browser.errors == []


def test_the_panel_tells_all_of_a_call(tmp_path: Path, calls, browser) -> None:
    nodes = page(tmp_path / "page.html", calls())
    browser.open(tmp_path / "page.html", height=800)
    browser.run("openAll(true)")
    name = "blocks.1.feedforward.up"
    node = next(node for node in nodes if node.name == name)
    browser.click(f'[aria-label^="{name},"]')
    told = browser.run(PANEL)
    parts = [name, "Linear", node.equation, node.inputs, node.output, "✓ agrees", "3.1 × 10⁻¹⁶", "2.2 × 10⁻⁹", "weight"]
    for part in [*parts, f"{node.activation_norm:.4g}", f"{node.gradient_norm:.4g}", "(64, 16)"]:
        assert part in told, part
    code = browser.run("[...document.querySelectorAll('pre')].map(pre => [...pre.children].map(d => d.textContent))")
    assert code == [textwrap.dedent(part).strip().splitlines() for part in (node.forward_code, node.backward_code)]
    marked = browser.run("[...document.querySelectorAll('pre .derived')].map(line => line.textContent)")
    assert [line.strip(" #") for line in marked] == node.derivation.splitlines()
    browser.click("#panel .chip")  # what it reads
    assert browser.run(NOW) == "blocks.1.feedforward_norm"
    browser.click("#panel .chip", browser.run("document.querySelectorAll('#panel .chip').length") - 1)
    assert browser.run(NOW) == name, "which reads that"
    picture = np.array(node.activation_picture)
    shade = round(255 * math.sqrt(picture[3, 5] / picture.max()))
    drawn = browser.run("[...document.querySelector('.maps canvas').getContext('2d').getImageData(5, 3, 1, 1).data]")
    colour = browser.run(f"palette(false)[{shade}]")
    assert drawn == [colour & 255, colour >> 8 & 255, colour >> 16 & 255, 255]
    x, y = browser.place(".maps canvas")
    wide, high = browser.run("(c => [c.clientWidth, c.clientHeight])(document.querySelector('.maps canvas'))")
    browser.move(x - wide / 2 + wide * 5.5 / picture.shape[1], y - high / 2 + high * 3.5 / len(TOKENS))
    said = browser.run("document.querySelector('#told').textContent")
    assert said.startswith("activation, position 3 (<script>alert(1)</script>), channel 6 to 7: about ")
    assert browser.errors == []


def test_a_wrong_layer_is_unmistakable_and_one_key_away(tmp_path: Path, calls, browser) -> None:
    wrong = "blocks.1.feedforward.activation"
    page(tmp_path / "page.html", calls(wrong=wrong))
    browser.open(tmp_path / "page.html", height=800)
    pair = "node => [node.getAttribute('aria-label').split(',')[0], node.classList[1]]"
    classes = f"Object.fromEntries({NODES}.map({pair}))"
    first = browser.run(classes)
    assert {name for name, kind in first.items() if kind == "within"} == {"GPT", "blocks.1"}
    assert "wrong" not in first.values(), "it is in a closed box"
    browser.press("w")
    assert browser.run(NOW) == wrong
    assert browser.run(classes)[wrong] == "wrong"
    label = browser.run("now.item.drawn.getAttribute('aria-label')")
    assert label == f"{wrong}, TanhGELU, gradient wrong" and browser.run("document.activeElement === now.item.drawn")
    assert browser.run("now.item.drawn.querySelector('.class').textContent") == "WRONG · TanhGELU"
    assert "hatch" in browser.run("getComputedStyle(now.item.drawn.querySelector('.shape')).fill")
    assert browser.run("document.querySelector('.verdict').textContent") == "✕ WRONG" and "1.75" in browser.run(PANEL)
    browser.press("Home")
    browser.click("#wrong")
    assert browser.run(NOW) == wrong
    page(tmp_path / "right.html", calls())
    browser.open(tmp_path / "right.html")
    assert browser.run("document.querySelector('#wrong').hidden")
    assert browser.run("document.querySelector('#all-agree').textContent") == "✓ all 37 gradients agree"
    browser.press("w")
    assert browser.errors == []


CROSSINGS = """(() => {
  const found = [], seen = calls.filter((call) => !hidden(call));
  const box = (call) => [call.X - call.L, call.Y, call.X + call.R, call.Y + (call.open ? HEADING : call.h)];
  for (const a of seen) for (const b of seen) {
    const [p, q] = [box(a), box(b)];
    if (a.number < b.number && p[0] < q[2] && q[0] < p[2] && p[1] < q[3] && q[1] < p[3]) found.push([a.name, b.name]);
  }
  for (const { drawn } of segments) for (let at = 0; at < drawn.getTotalLength(); at += 5) {
    const { x, y } = drawn.getPointAtLength(at);
    for (const call of seen) {
      const [left, top, right, bottom] = box(call);
      if (x > left + 1 && x < right - 1 && y > top + 1 && y < bottom - 1) found.push(["an edge", call.name]);
    }
  }
  for (const text of document.querySelectorAll("#graph .call text")) {
    const inner = text.getBoundingClientRect(), outer = text.parentNode.querySelector(".shape").getBoundingClientRect();
    if (inner.left < outer.left || inner.right > outer.right) found.push(["text", text.textContent]);
  }
  return found;
})()"""


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_lies_on_anything(tmp_path: Path, calls, browser, shape: str) -> None:
    nodes = page(tmp_path / "page.html", calls(shape))
    browser.open(tmp_path / "page.html", height=800)
    assert browser.run(CROSSINGS) == []
    browser.run("openAll(true)")
    assert browser.run(f"{NODES}.length") == len(nodes)
    assert browser.run(CROSSINGS) == []
    arrives = {to for _, to in browser.run(EDGES)}
    assert {node.name for node in leaves(nodes)} <= arrives, "every call reads something"
    assert browser.errors == []


def test_at_a_thousand_pixels_nothing_is_cut_off(tmp_path: Path, calls, browser) -> None:
    page(tmp_path / "page.html", calls(wrong="blocks.0.attention.attend"))
    browser.open(tmp_path / "page.html", width=1000, height=800)
    browser.press("w")
    for place in ("document.documentElement", "document.querySelector('#panel')", "document.querySelector('header')"):
        assert browser.run(f"{place}.scrollWidth - {place}.clientWidth") <= 0, place
    assert browser.run("document.querySelector('.bar').clientHeight") < 40, "one line of buttons"
    assert browser.errors == []


def test_no_text_becomes_markup(tmp_path: Path, calls, browser) -> None:
    bad = "<b>x</b></script><script>alert(1)</script>"
    words = dict.fromkeys(("layer", "equation", "derivation", "forward_code", "inputs", "output", "verdict"), bad)
    nodes = [dataclasses.replace(node, **words) for node in calls()[:1]]
    nodes += [dataclasses.replace(nodes[0], number=1, name=bad, parent=0, parameters=((bad, bad, 1.0, None),))]
    nodes += [dataclasses.replace(nodes[1], number=2, sources=(1,), activation_norm=math.nan, returned_norm=math.inf)]
    write_gradients_page(tmp_path / "page.html", bad, TOKENS, math.nan, nodes)
    browser.open(tmp_path / "page.html")
    browser.press("ArrowRight")
    assert browser.run("document.scripts.length") == 4
    assert (
        browser.run("document.querySelectorAll('h1 b, .token b, h2 b, .equation b, pre b, td b, #graph b').length") == 0
    )
    told = browser.run(PANEL)
    assert bad in told and "not a number" in told and "∞" in told
    shown = browser.run("[...document.querySelectorAll('.token')].map(t => t.textContent)")
    visible = {" be": "␣be", "\n": "↵", "\u202e": "\\u202e"}
    assert shown == [visible.get(token, token) for token in TOKENS]
    assert browser.errors == []


def test_dark_and_light(tmp_path: Path, calls, browser) -> None:
    page(tmp_path / "page.html", calls())
    browser.open(tmp_path / "page.html", dark=True)
    background, picture = (
        "getComputedStyle(document.body).backgroundColor",
        "document.querySelector('canvas').toDataURL()",
    )
    fill = "getComputedStyle(document.querySelector('.call:not(.now) .shape')).fill"
    dark = [browser.run(background), browser.run(picture), browser.run(fill)]
    browser.theme(dark=False)
    for part, before in zip((background, picture, fill), dark):
        browser.until(f"{part} !== {json.dumps(before)}")
    assert browser.run(background) == "rgb(255, 255, 255)"
    assert browser.errors == []


def test_the_curves_lead_to_a_call(tmp_path: Path, calls, browser) -> None:
    page(tmp_path / "page.html", calls(layers=12))
    browser.open(tmp_path / "page.html", height=800)
    assert browser.run("document.querySelectorAll('#curves path').length") == 2
    browser.click("#curves")
    assert browser.run(NOW) == "blocks.5"
    browser.run("openAll(true)")
    assert browser.run(f"{NODES}.length") == 187
    browser.click("#curves")
    assert browser.run(NOW).startswith("blocks.5.") or browser.run(NOW).startswith("blocks.6.")
    assert browser.errors == []

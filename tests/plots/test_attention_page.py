"""The attention page: what is in it, and what it does in a real browser."""

import base64
import json
import zlib
from pathlib import Path

import numpy as np
import pytest

from quire.plots.attention_page import HeadMaps, quantized, write_attention_page

TOKENS = [
    "To",
    " be",
    "\n",
    "<script>alert(1)</script>",
    "</script>",
    "\"'&amp;",
    "שלום",
    "😀",
    "\u202e",
    "森",
    "<!--",
    "$&",
]


def weights(heads: int, rows: int, columns: int | None = None) -> np.ndarray:
    draw = np.random.default_rng(1).exponential(size=(heads, rows, columns or rows)) ** 2
    draw = draw if columns else np.tril(draw)
    return (draw / draw.sum(-1, keepdims=True)).astype(np.float32)


def scores(layer: int, heads: int) -> list[list[tuple[str, float]]]:
    return [[("entropy", layer + head / 10)] for head in range(heads)]


def page(path: Path, length: int = 12, layers: int = 3, heads: int = 4) -> list[HeadMaps]:
    """A decoder's page; its next tokens are those that do come."""
    tokens = [TOKENS[i % len(TOKENS)] for i in range(length)]
    maps = [
        HeadMaps(f"blocks.{n}.attention", "prompt", "prompt", weights(heads, length), scores(n, heads))
        for n in range(layers)
    ]
    expected = [[(token, 0.5), ("<b>", 0.25), ("", 0.1), ("x", 0.01), ("y", 0.001)] for token in [*tokens[1:], "end"]]
    write_attention_page(path, 'runs/<i>&"__DATA__', maps, {"prompt": tokens}, "prompt", expected)
    return maps


# ---- without a browser ----


def test_weights_come_back_from_the_page(tmp_path: Path, in_page) -> None:
    maps = page(tmp_path / "page.html")
    data = in_page(tmp_path / "page.html")
    assert [layer["name"] for layer in data["layers"]] == [layer.name for layer in maps]
    for packed, layer in zip(data["layers"], maps, strict=True):
        bytes_ = np.frombuffer(zlib.decompress(base64.b64decode(packed["data"])), dtype=np.uint8)
        back = (bytes_.reshape(layer.weights.shape) / 255.0) ** 2
        assert np.abs(back - layer.weights).max() < 0.004
        small = layer.weights < 0.01
        assert small.any() and np.abs(back - layer.weights)[small].max() < 0.0004


def test_quantized_ends() -> None:
    assert quantized(np.array([0, 1, 1.0000001, 0.25])).tolist() == [0, 255, 255, 128]


def test_twelve_layers_of_twelve_heads_fit_an_email(tmp_path: Path) -> None:
    page(tmp_path / "page.html", 100, 12, 12)
    assert (tmp_path / "page.html").stat().st_size < 1_500_000


def test_the_page_asks_nobody(tmp_path: Path) -> None:
    page(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "http:" not in text and "https:" not in text and "src=" not in text and "import(" not in text
    assert "default-src 'none'" in text
    assert text.count("<script") == 2 and text.count("</script>") == 2, "no token opens or ends a script"
    assert "<title>runs/&lt;i&gt;&amp;&quot;__DATA__</title>" in text


# ---- in a browser ----

CHOSEN = "document.querySelector('.token.chosen').textContent"
ATTENDED = """[...document.querySelectorAll('#attended tr')].map(
    row => [row.cells[0].textContent, Number(row.cells[1].textContent), Number(row.cells[2].textContent)])"""
EXPECTED = """[...document.querySelectorAll('#expected tr')].map(
    row => [row.cells[0].textContent, Number(row.cells[2].textContent)])"""
NAME = "document.querySelector('#name').textContent"


def strongest(row: np.ndarray) -> list[int]:
    return sorted(range(len(row)), key=lambda i: -row[i])[:3]


def test_heads_switch_and_tokens_tell(tmp_path: Path, browser) -> None:
    maps = page(tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    assert browser.run(NAME) == "blocks.0.attention, head 0"
    assert browser.run("document.querySelectorAll('#heads button canvas').length") == 12
    assert browser.run("document.title") == 'runs/<i>&"__DATA__'
    picture = browser.run("document.querySelector('#map').toDataURL()")

    browser.click("#heads button", 6)
    assert browser.run(NAME) == "blocks.1.attention, head 2"
    assert browser.run("document.querySelector('[aria-pressed=true]').title") == "blocks.1.attention, head 2"
    assert browser.run("document.querySelector('#scores').textContent") == "entropy 1.20"
    assert browser.run("document.querySelector('#map').toDataURL()") != picture, "another heat map"

    browser.hover(".token", 9)
    values = maps[1].weights[2]
    assert browser.run(CHOSEN) == "森"
    attended = browser.run(ATTENDED)
    assert [place for _, place, _ in attended][:3] == strongest(values[9])
    assert all(abs(share - values[9][place]) < 0.005 for _, place, share in attended)
    assert browser.run(EXPECTED)[:2] == [["<!--", 0.5], ["<b>", 0.25]]
    shades = browser.run(
        "[...document.querySelectorAll('.token')].map(t => +(t.style.background.match(/[\\d.]+(?=\\))/) || [0])[0])"
    )
    assert shades == pytest.approx(np.sqrt(values[9]).tolist(), abs=0.01)

    browser.click("[name=side]", 1)  # what attends to the token
    assert [place for _, place, _ in browser.run(ATTENDED)][:3] == strongest(values[:, 9])
    assert (browser.errors, browser.requests) == ([], [(tmp_path / "page.html").as_uri()])


def test_the_heat_map_under_the_mouse(tmp_path: Path, browser) -> None:
    maps = page(tmp_path / "page.html", 5)
    browser.open(tmp_path / "page.html")
    browser.place("#map")
    box = "document.querySelector('#map').getBoundingClientRect()"
    x, y, left, top, cell = browser.run(f"(b => [b.x, b.y, shape.left, shape.top, shape.cell])({box})")
    browser.move(x + left + 1.5 * cell, y + top + 3.5 * cell)
    share = maps[0].weights[0, 3, 1]
    said = browser.run("document.querySelector('#said').textContent")
    assert said.startswith("<script>alert(1)</script> (3) attends to ␣be (1) with ")
    assert abs(float(said.split()[-1]) - share) < 0.005
    assert browser.run(CHOSEN) == "<script>alert(1)</script>"
    context = "document.querySelector('#map').getContext('2d')"
    place = "shape.left + 1.5 * shape.cell, shape.top + 3.5 * shape.cell"
    drawn = browser.run(f"[...{context}.getImageData({place}, 1, 1).data]")
    colour = browser.run(f"palette[{quantized(share[None])[0]}]")
    assert drawn == [colour & 255, colour >> 8 & 255, colour >> 16 & 255, 255]
    assert browser.errors == []


def test_the_keyboard_goes_everywhere(tmp_path: Path, browser) -> None:
    page(tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    browser.run("document.querySelector('[aria-pressed=true]').focus()")
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "ArrowLeft", "ArrowUp", "ArrowUp", "ArrowRight"):
        browser.press(key)
    assert browser.run(NAME) == "blocks.0.attention, head 2"
    assert browser.run("document.activeElement.title") == "blocks.0.attention, head 2"
    browser.run("document.querySelector('.token.chosen').focus()")
    for key, token in [
        ("Home", 0),
        ("ArrowRight", 1),
        ("ArrowRight", 2),
        ("ArrowLeft", 1),
        ("End", 11),
        ("ArrowRight", 11),
    ]:
        browser.press(key)
        assert (
            browser.run("[...document.querySelectorAll('.token')].indexOf(document.querySelector('.chosen'))") == token
        )
    assert browser.run("document.querySelectorAll('#heads [tabindex=\"0\"]').length") == 1
    assert browser.errors == []


def test_no_text_becomes_markup(tmp_path: Path, browser) -> None:
    page(tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    assert browser.run("document.scripts.length") == 2
    assert browser.run("document.querySelectorAll('.strip script, .strip b b, table b, h1 i').length") == 0
    shown = browser.run("[...document.querySelectorAll('.token')].map(t => t.textContent)")
    visible = {" be": "␣be", "\n": "↵", "\u202e": "\\u202e"}
    assert shown == [visible.get(token, token) for token in TOKENS]
    assert browser.errors == []


def test_dark_and_light(tmp_path: Path, browser) -> None:
    page(tmp_path / "page.html", 5)
    browser.open(tmp_path / "page.html", dark=True)
    background = "getComputedStyle(document.body).backgroundColor"
    dark, map_ = browser.run(background), browser.run("document.querySelector('#map').toDataURL()")
    browser.theme(dark=False)
    browser.until(f"{background} !== {json.dumps(dark)}")
    assert browser.run(background) == "rgb(255, 255, 255)"
    browser.until(f"document.querySelector('#map').toDataURL() !== {json.dumps(map_)}")
    assert browser.errors == []


def test_an_encoder_decoders_page(tmp_path: Path, browser) -> None:
    """Three groups of layers; pointing at what is written shows where it looks in the prompt, and the other way."""
    maps = [
        HeadMaps("encoder.0.attention", "prompt", "prompt", weights(2, 3, 3)),
        HeadMaps("decoder.0.attention", "written", "written", weights(2, 5)),
        HeadMaps("decoder.0.cross_attention", "written", "prompt", weights(2, 5, 3)),
    ]
    sequences = {"prompt": ["a", "b", "c"], "written": ["<s>", "c", "b", "a", "."]}
    write_attention_page(tmp_path / "page.html", "copies", maps, sequences, "written", [[("x", 1.0)]] * 5)
    browser.open(tmp_path / "page.html")
    browser.hover(".token", 1)
    assert browser.run(EXPECTED) == [], "an encoder expects nothing"
    browser.click("#heads button", 2)
    assert browser.run("document.querySelectorAll('.token').length") == 5 and browser.run(EXPECTED) == [["x", 1]]
    browser.click("#heads button", 5)
    assert browser.run(NAME) == "decoder.0.cross_attention, head 1"
    browser.hover("[data-sequence=written] .token", 4)
    assert [place for _, place, _ in browser.run(ATTENDED)] == strongest(maps[2].weights[1, 4])
    browser.hover("[data-sequence=prompt] .token", 2)
    assert [place for _, place, _ in browser.run(ATTENDED)][:3] == strongest(maps[2].weights[1, :, 2])
    assert browser.errors == []


def test_a_hundred_tokens_are_all_named(tmp_path: Path, browser) -> None:
    page(tmp_path / "page.html", 100, 2, 2)
    browser.open(tmp_path / "page.html")
    assert browser.run("shape.cell") >= 11, "room for a label a token"
    browser.run("document.querySelector('#maps').scrollIntoView()")
    assert (
        browser.run("document.querySelector('#frame').scrollWidth - document.querySelector('#frame').clientWidth") <= 0
    )
    assert browser.errors == []

"""The page of app.py in headless Chromium, wide and as narrow as a phone: sliders, an answer that
streams, modes, two columns, stop and clear, hostile text, no scrolling sideways, no request that
leaves this machine. APP_SHOTS=folder keeps the screenshots.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path
from urllib.parse import urlparse

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
pytest.importorskip("gradio", reason="pip install gradio")
from test_app import HOSTILE, lm, model_flags, serving, step  # noqa: E402, F401

import app  # noqa: E402
from memory_lm import Neighbour  # noqa: E402

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium: apt-get install chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-quic",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]
WIDE, PHONE = (1280, 900), (390, 844)
# the farthest right that anything is drawn, in pixels of the window
FARTHEST = """() => Math.max(document.documentElement.scrollWidth, ...[...document.querySelectorAll(
    '#page *, #head *')].filter(e => e.offsetParent).map(e => e.getBoundingClientRect().right))"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(params=[WIDE, PHONE], ids=["wide", "phone"])
def window(request, browser):
    """A window of its own; at its end, nothing went elsewhere and nothing went wrong."""
    context = browser.new_context(viewport=dict(zip(("width", "height"), request.param,
                                                    strict=True)))
    page, asked, wrong = context.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("websocket", lambda socket: asked.append(socket.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
    page.on("console", lambda line: line.type == "error" and wrong.append(line.text))
    page.set_default_timeout(20_000)
    yield page
    context.close()
    hosts = {urlparse(url).hostname for url in asked if not url.startswith(("data:", "blob:"))}
    assert hosts == {"127.0.0.1"} and wrong == []


def load(page, address: str) -> None:
    page.goto(address)
    page.wait_for_selector("#box textarea")


def say(page, text: str) -> None:
    page.fill("#box textarea", text)
    page.click("#send")


def choose(page, mode: str) -> None:
    page.locator("#mode label", has_text=re.compile(f"^ *{mode} *$")).click()


def set_slider(page, name: str, value: float) -> None:
    page.fill(f"#{name} input[type=number]", str(value))
    page.press(f"#{name} input[type=number]", "Tab")


def shoot(page, name: str, folder: Path) -> None:
    """A screenshot of a page on which nothing reaches beyond the window."""
    wide = page.viewport_size["width"]
    assert page.evaluate(FARTHEST) <= wide + 0.5
    kept = Path(os.environ.get("APP_SHOTS", folder))
    kept.mkdir(parents=True, exist_ok=True)
    picture = kept / f"{name}_{wide}.png"
    page.screenshot(path=picture)
    assert picture.stat().st_size > 5_000


@pytest.fixture
def slowly(monkeypatch):
    """The tiny model at the pace of a larger one, so that there is time to look and to stop."""
    generate = app.generate

    def slow(*arguments):
        for one in generate(*arguments):
            time.sleep(0.02)
            yield one

    monkeypatch.setattr(app, "generate", slow)


def test_an_answer_streams_and_its_evidence_is_listed(window, lm, slowly, tmp_path):  # noqa: F811
    with serving(lm) as address:
        load(window, address)
        shoot(window, "empty", tmp_path)
        wanted = {"alpha": 0.9, "temperature": 0.5, "top_k": 20, "max_new_tokens": 120}
        for name, value in wanted.items():
            set_slider(window, name, value)
            assert float(window.input_value(f"#{name} input[type=range]")) == value
        window.locator("#alpha input[type=range]").press("ArrowLeft")
        assert float(window.input_value("#alpha input[type=number]")) == 0.89

        say(window, "Ba den fi gor")
        window.wait_for_selector("#live .answer.live mark")
        shoot(window, "streaming", tmp_path)
        lengths = []  # the text grows while it is written
        while window.query_selector("#live .answer.live"):
            lengths.append(len(window.inner_text("#log")))
            window.wait_for_timeout(20)
        assert len(set(lengths)) >= 4 and lengths[1:-1] == sorted(lengths[1:-1])
        window.wait_for_selector("#found table")
        assert window.input_value("#box textarea") == ""
        assert window.locator("#past mark").count() > 0
        rows = window.locator("#found tbody tr").count()
        marks = int(re.search(r"both: (\d+) of 120 tokens", window.inner_text("#found"))[1])
        assert rows == min(marks, app.MAX_ROWS) and window.locator("#found li").count() >= rows
        shoot(window, "answered", tmp_path)


def test_two_answers_stand_beside_or_below_each_other(window, lm, tmp_path):  # noqa: F811
    with serving(lm) as address:
        load(window, address)
        choose(window, "kNN-LM")  # brings the lambda that was tuned for it
        window.wait_for_function("value => document.querySelector('#lambda input[type=number]')"
                                 ".value == value", arg=str(lm.tuned("knn")[1]))
        set_slider(window, "lambda", 0)
        set_slider(window, "max_new_tokens", 12)
        window.check("#beside input")
        window.fill("#box textarea", "hul ka")
        window.press("#box textarea", "Enter")
        window.wait_for_selector("#found :text('The base alone would have said the same')")
        base, memory = window.locator("#past .answers.beside .answer").all()
        words = base.locator("p").inner_text()
        assert memory.locator("p").inner_text() == words != ""  # alpha 0 is the base
        first, second = base.bounding_box(), memory.bounding_box()
        if window.viewport_size["width"] == WIDE[0]:
            assert first["y"] == second["y"] and first["x"] + first["width"] <= second["x"]
        else:
            assert first["x"] == second["x"] and first["y"] + first["height"] <= second["y"]
        shoot(window, "beside", tmp_path)


def test_stop_clear_and_refusal(window, lm, slowly, tmp_path):  # noqa: F811
    with serving(lm) as address:
        load(window, address)
        set_slider(window, "max_new_tokens", 500)
        say(window, "Ba den fi gor")
        window.wait_for_function("document.querySelector('#live .answer p')?.innerText.length > 40")
        window.click("#stop")
        window.wait_for_selector("#past .answer")
        window.wait_for_selector("#live .answer", state="detached")
        kept = window.inner_text("#past")
        assert int(re.search(r"of (\d+) tokens", window.inner_text("#found"))[1]) < 500
        window.wait_for_timeout(500)
        assert window.inner_text("#past") == kept and window.inner_text("#notice") == ""
        say(window, "x" * 20_001)
        window.wait_for_selector("#notice :text('20,001 characters')")
        assert len(window.input_value("#box textarea")) == 20_001  # not lost
        shoot(window, "refused", tmp_path)
        window.click("#clear")
        window.wait_for_selector("#past :text('Write a message below')")
        assert window.inner_text("#found") == window.inner_text("#notice") == ""


def test_hostile_text_is_shown_letter_by_letter(window, lm, monkeypatch, tmp_path):  # noqa: F811
    def generate(lm, ids, sampling):
        for text in HOSTILE:
            yield step(" " + text, True, [Neighbour(text, text * 3, 1.0, 0.2)] * 5, base=text)

    monkeypatch.setattr(app, "generate", generate)
    monkeypatch.setattr(app, "chat_ids", lambda *_: ([1], 0))
    with serving(lm) as address:
        load(window, address)
        window.check("#beside input")
        say(window, "".join(HOSTILE) + "unbroken" * 60)
        window.wait_for_selector("#found table")
        shown = window.evaluate("document.querySelector('#log').textContent")
        found = window.evaluate("document.querySelector('#found').textContent")
        assert all(shown.count(text) >= 3 and text in found for text in HOSTILE)
        assert window.locator("#log script, #log img, #found script, #found img").count() == 0
        shoot(window, "hostile", tmp_path)


def test_a_second_visitor_waits_and_sees_nothing_of_the_first(browser, lm, slowly):  # noqa: F811
    with serving(lm, concurrency=1) as address:
        one, two = (browser.new_context().new_page() for _ in range(2))
        for page in (one, two):
            load(page, address)
            set_slider(page, "max_new_tokens", 500)
        say(one, "first visitor")
        one.wait_for_selector("#live .answer")
        say(two, "second visitor")
        two.wait_for_selector("#live .waiting")
        assert not two.is_visible("#stop") and not two.is_visible("#clear")
        two.click("#leave")  # gives up its place; the words stay in the box
        two.wait_for_selector("#live .waiting", state="detached")
        assert two.input_value("#box textarea") == "second visitor"
        assert two.inner_text("#notice") == "" and two.is_visible("#stop")
        one.click("#stop")
        one.wait_for_selector("#past .answer")
        assert "second" not in one.inner_text("#log") and "first" not in two.inner_text("#log")
        for page in (one, two):
            page.context.close()

"""Tests of app.py: what a model or a visitor wrote is never HTML, conversations and their limits,
twenty visitors at once against a really running page, the command and its one-line mistakes, and
that the server speaks to no other machine.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import importlib.util
import io
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, error_line, flags, write_corpus

import app
import memory_decoder
import memory_lm
from memory_lm import Neighbour, Sampling, Step

pytest.importorskip("faiss", reason="pip install faiss-cpu")
HOSTILE = ["<script>alert(1)</script>", "</p></div><img src=x onerror=alert(1)>", "&lt;b&gt;",
           '" onmouseover="alert(1)', "'><mark>", "${1+1} {{value}} `x` \\", "<!--", "ä 😀 \u202e"]
UPLOAD = (b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\n'
          b"a\r\n--x--\r\n")
SHOWN = set("p div mark span h3 h4 b table thead tbody tr th td ul li".split())
GREEDY = Sampling("knn", 0.5, 0.5, 0.0, 0, 5)
needs_gradio = pytest.mark.skipif(not importlib.util.find_spec("gradio"),
                                  reason="pip install gradio")


class Reader(HTMLParser):
    """What a browser would make of HTML: its tags, its attributes, its text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags, self.names, self.text = set(), set(), ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.names |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


def step(text: str, changed: bool = False, neighbours=(), base: str = " base") -> Step:
    """A generated token."""
    return Step(1, text, changed, base, 0.25, 0.5, list(neighbours))


def write_model(folder: Path, tokenizer_folder: str) -> list[str]:
    """Build a tiny base, its datastore and its decoder -> the flags that name them."""
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = GPT2Config(vocab_size=300, n_positions=64, n_embd=16, n_layer=1, n_head=2,
                       bos_token_id=None, eos_token_id=None)
    GPT2LMHeadModel(sizes).save_pretrained(folder / "base")
    PreTrainedTokenizerFast.from_pretrained(tokenizer_folder).save_pretrained(folder / "base")
    argv = flags(dict(
        base=folder / "base", domain=write_corpus(folder / "domain", 600), index="flat", knn_k=8,
        model_dir=folder / "made", plot_dir=folder, arms="", decoder_dim=16, decoder_layers=1,
        decoder_heads=2))
    for command in ("build", "train", "tune"):
        assert memory_decoder.main([command, *argv]) == 0
    return ["--model_dir", str(folder / "made")]


@pytest.fixture(scope="session")
def model_flags(tmp_path_factory, tokenizer_folder) -> list[str]:
    return write_model(tmp_path_factory.mktemp("app"), tokenizer_folder)


@pytest.fixture(scope="session")
def lm(model_flags) -> memory_lm.MemoryLM:
    return memory_lm.MemoryLM.load(model_flags[1])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serving(lm, **fields):
    """A really running page -> its address."""
    config = app.Config(port=free_port(), **fields)
    blocks = app.page(lm, config)
    try:
        yield app.serve(blocks, config)
    finally:
        blocks.close(verbose=False)


def client(address: str):
    """A visitor without a browser."""
    from gradio_client import Client

    return Client(address, verbose=False, analytics_enabled=False, httpx_kwargs={"timeout": 60})


def expected(lm, messages: list[dict], sampling: Sampling) -> str:
    """The answer by memory_lm alone."""
    ids, _ = memory_lm.chat_ids(lm, messages, min(sampling.max_new_tokens, lm.window // 2))
    return "".join(step.text for step in memory_lm.generate(lm, ids, sampling))


# ── importing, HTML ──────────────────────────────────────────────────────────────────────────────
def test_importing_app_loads_nothing_and_says_nothing():
    code = ("import sys, app; print([m for m in ('gradio', 'transformers', 'faiss') "
            "if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("changed", [False, True])
def test_what_others_wrote_is_shown_and_never_html(text, changed):
    answer = app.Answer("both")
    answer.add(step(text, changed, [Neighbour(text, text, 1.0, 0.5)], base=text))
    turn = Reader(app.turn_html(text, [app.Answer("base"), answer], live=False))
    assert turn.tags <= SHOWN and turn.names <= {"class", "title"}
    assert turn.text.count(text) == 2  # the visitor's, the model's
    found = Reader(app.evidence_html(answer))
    assert found.tags <= SHOWN and found.names <= {"class", "style", "data-name"}
    assert found.text.count(text) == 4 * changed  # with memory, base alone, context, neighbour
    assert Reader(app.notice_html(text)).text == text


def test_change_inside_a_character_is_marked_when_it_is_whole():
    answer = app.Answer("knn")
    for part in (step("a"), step("", changed=True), step("é", changed=False), step(" b")):
        answer.add(part)
    assert answer.text == "aé b"
    assert re.findall("<mark[^>]*>(.*?)</mark>", answer.to_html(False, False)) == ["é"]


def test_mark_leaves_the_space_before_a_word_alone():
    answer = app.Answer("knn")
    answer.add(step("\n word", changed=True))
    assert "\n <mark" in answer.marked[0] and answer.marked[0].endswith(">word</mark>")


def test_percent_has_a_digit_below_ten_and_a_bound_below_a_tenth():
    shown = {0: "0.0 %", 0.0004: "&lt; 0.1 %", 0.0123: "1.2 %", 0.0996: "10 %", 1: "100 %"}
    assert {p: app.percent(p) for p in shown} == shown


def test_evidence_counts_lists_and_stops_at_its_limit():
    answer = app.Answer("decoder")
    for i in range(200):
        answer.add(step(f" w{i}", changed=i % 2 == 0))
    found = app.evidence_html(answer)
    assert "100 of 200 tokens" in found and f"The first {app.MAX_ROWS} are listed" in found
    assert found.count("<tr>") == app.MAX_ROWS + 1 and "25 % → 50 %" in found
    assert app.evidence_html(app.Answer("base")) == ""
    same = app.Answer("both")
    same.add(step("x"))
    assert "0 of 1 tokens" in app.evidence_html(same) and "<table" not in app.evidence_html(same)


# ── a conversation, with a stand-in for the model ────────────────────────────────────────────────
@pytest.fixture
def fake(monkeypatch):
    """A model that answers with the number of messages and the mode, then words; see `fail`."""
    fake = SimpleNamespace(window=64, fail=None, words=["a", " b", " c"], dropped=0, asked=[])

    def chat_ids(lm, messages, reserve):
        fake.asked.append(messages)
        return [len(messages)], fake.dropped

    def generate(lm, ids, sampling):
        for i, word in enumerate([f"{ids[0]} {sampling.mode}: ", *fake.words]):
            if i == 2 and fake.fail:
                raise fake.fail
            yield step(word, changed=sampling.mode != "base" and i == 1)

    monkeypatch.setattr(app, "chat_ids", chat_ids)
    monkeypatch.setattr(app, "generate", generate)
    monkeypatch.setattr(app, "EVERY_S", 0.0)
    return fake


def talk(lm, session, text, sampling=GREEDY, beside=False):
    """Every View of an answer."""
    return [*app.converse(lm, session, text, sampling, beside, "UNCHANGED")]


def text_of(html: str) -> str:
    """What a reader sees of HTML."""
    return Reader(html).text


def test_answer_streams_and_is_remembered_as_message_dicts(fake):
    session = app.Session()
    views = talk(fake, session, "hello")
    assert [text_of(view.live) for view in views] == [
        "hello…", "hello1 knn: ", "hello1 knn: a", "hello1 knn: a b", "hello1 knn: a b c", ""]
    assert views[-1].box == "" and "1 of 4 tokens" in views[-1].evidence
    assert session.messages == [{"role": "user", "content": "hello"},
                                {"role": "assistant", "content": "1 knn: a b c"}]
    last = talk(fake, session, "again")[-1]
    assert text_of(last.past) == "hello1 knn: a b cagain3 knn: a b c"
    assert fake.asked[-1] == session.messages[:3]


def test_an_answer_of_blank_lines_ends_and_is_said(fake, monkeypatch):
    fake.words = ["\n"] * 500
    session = app.Session()
    views = talk(fake, session, "hello")
    assert app.BLANK not in views[-1].notice, "it had words before"
    assert len(views[-1].past) < 500 and session.messages[-1]["content"].count("\n") <= 16

    monkeypatch.setattr(app, "generate", lambda *_: (step("\n", False) for _ in range(500)))
    last = talk(fake, session, "again")[-1]
    assert "blank lines" in last.notice and len(session.messages) == 2


def test_a_neighbour_shows_its_file_and_line_and_unfolds_its_passage():
    neighbour = Neighbour(" <b>", "so", 1.0, 0.5, "a<b>.txt:7", ("<i>before", "behind"))
    item = app.neighbour_item(neighbour, 0.5)
    assert "a&lt;b&gt;.txt:7" in item and "<i>" not in item
    assert "<mark> &lt;b&gt;</mark>behind" in item and "<details>" in item
    assert "<details>" not in app.neighbour_item(neighbour._replace(place=""), 0.5)


def test_beside_the_base_shows_both_and_goes_on_with_the_chosen(fake):
    session = app.Session()
    last = talk(fake, session, "x", beside=True)[-1]
    assert text_of(last.past) == "xbase1 base: a b ckNN-LM1 knn: a b c"
    assert session.messages[-1]["content"] == "1 knn: a b c"
    alone = talk(fake, app.Session(), "x", GREEDY._replace(mode="base"), beside=True)[-1]
    assert text_of(alone.past) == "x1 base: a b c" and alone.evidence == ""


@pytest.mark.parametrize("turns, text, said", [
    (1, " \n\t", "empty"), (1, "x" * 20_001, "20,001"), (1, "x" * 3_000_000, "20,000"),
    (app.MAX_TURNS, "x", "clear it")])
def test_what_cannot_be_answered_is_refused_in_the_page(fake, turns, text, said):
    session = app.Session(turns=["first"] * turns)
    (view,) = talk(fake, session, text)
    assert said in view.notice and 'class="error"' in view.notice and view.box == "UNCHANGED"
    assert "first" in view.past and view.live == "" and session.messages == fake.asked == []


def test_half_a_surrogate_pair_is_replaced(fake):
    view = talk(fake, app.Session(), "a\ud800b")[-1]
    assert "a?b" in view.past
    view.past.encode()


def test_left_out_messages_are_counted_in_the_page(fake):
    fake.dropped = 4
    views = talk(fake, app.Session(), "x")
    assert all("oldest first: 4." in view.notice and "64 tokens" in view.notice for view in views)


@pytest.mark.parametrize("failure", [RuntimeError("CUDA out of <memory>"), ValueError("no"),
                                     MemoryError(), OSError("disk"), IndexError("out of range")])
def test_failing_model_becomes_a_sentence_and_keeps_what_was_said(fake, failure, capsys):
    fake.fail = failure
    session = app.Session()
    last = talk(fake, session, "x")[-1]
    assert "could not go on" in last.notice and "memory" not in last.notice
    assert session.messages[-1]["content"] == "1 knn: a" and session.draft is None
    assert capsys.readouterr().err.count("\n") == 1


def begin(lm, session: app.Session, views: int):
    """A run of which some views have been shown."""
    run = app.converse(lm, session, "x", GREEDY, False, None)
    for _ in range(views):
        next(run)
    return run


def test_stop_and_clear_end_the_run_which_has_the_last_word(fake):
    session = app.Session()
    run = begin(fake, session, 3)
    session.draft.wish = "stop"
    (last,) = run
    assert "1 of 2 tokens" in last.evidence and text_of(last.past) == "x1 knn: a"
    assert session.messages[-1]["content"] == "1 knn: a" and session.draft is None
    run = begin(fake, session, 3)
    session.draft.wish = "clear"
    assert [*run] == [app.View(app.EMPTY)] and session == app.Session()


def test_visitor_who_left_keeps_what_was_said(fake):
    session = app.Session()
    begin(fake, session, 3).close()  # as the server does when the page is closed
    assert session.draft is None and session.messages[-1]["content"] == "1 knn: a"


def test_asking_again_stops_the_answer_before(fake):
    session = app.Session()
    first = begin(fake, session, 2)
    assert text_of(talk(fake, session, "y")[-1].past) == "x1 knn: y3 knn: a b c"
    assert [*first] == []


def test_answer_without_a_word_is_shown_but_not_remembered(fake, monkeypatch):
    monkeypatch.setattr(app, "generate", lambda *_: (x for x in ()))
    session = app.Session()
    assert "(no answer)" in talk(fake, session, "x")[-1].past and session.messages == []


# ── the page, really running, with a tiny real model ─────────────────────────────────────────────
def test_tuned_shares_are_the_modes_own():
    settings = {"alpha": 0.5, "lambda": 0.25, "both": {"alpha": 0.75, "lambda": 0.1}}
    lm = memory_lm.MemoryLM("", None, None, None, settings)
    assert [lm.tuned(mode) for mode in app.MODES] == [(0, 0), (0, 0.25), (0.5, 0), (0.75, 0.1)]


@pytest.mark.slow
@needs_gradio
def test_twenty_visitors_at_once_are_not_mixed(lm):
    modes = itertools.cycle(["knn", "both", "decoder", "base"])
    visitors = [(f"visitor number {i} says {'ba' * i}", next(modes)) for i in range(20)]

    def visit(text, mode):
        chat, messages, past = client(address), [], ""
        for turn in range(2):
            said = f"{text} {turn}"
            messages.append({"role": "user", "content": said})
            sampling = Sampling(mode, 0.5, 0.5, 0.8, 50, 12, seed=turn)
            past = chat.predict(said, mode, False, 0.5, 0.5, 0.8, 50, 12, api_name="/chat")[0]
            messages.append({"role": "assistant", "content": expected(lm, messages, sampling)})
        return Reader(past).text, "".join(message["content"] for message in messages)

    with serving(lm, concurrency=8) as address:
        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            answers = [*pool.map(visit, *zip(*visitors, strict=True))]
    assert [shown for shown, _ in answers] == [known for _, known in answers]
    assert len({shown for shown, _ in answers}) == 20


@needs_gradio
def test_a_visitor_stops_and_clears_what_is_his_alone(lm):
    with serving(lm) as address:
        one, two = client(address), client(address)
        job = one.submit("ba den fi", "knn", True, 0.5, 0.5, 0, 0, 400, api_name="/chat")
        while len(job.outputs()) < 3:
            time.sleep(0.01)
        assert "ba den fi" in job.outputs()[-1][1]
        two.predict(api_name="/stop")  # another visitor's, stops nothing
        assert "ba den fi" not in two.predict(api_name="/clear")[0]
        one.predict(api_name="/stop")
        past, live, evidence, *_ = job.result(timeout=60)
        assert "ba den fi" in past and live == ""
        assert 0 < int(re.search(r"of (\d+) tokens", evidence)[1]) < 400
        assert "Write a message" in one.predict(api_name="/clear")[0]
        long = " ".join(["gor"] * 300)  # fewer characters than allowed, too many tokens
        view = two.predict(long, "knn", False, 0.5, 0.5, 0, 0, 5, api_name="/chat")
        assert 'class="error"' in view[3] and "window" in view[3]


@needs_gradio
def test_queue_is_limited(lm, monkeypatch):
    monkeypatch.setattr(app, "generate", lambda *_: (time.sleep(0.1) or step("x")
                                                     for _ in range(20)))
    with serving(lm, concurrency=1, queue_size=1) as address:
        clients = [client(address) for _ in range(6)]
        jobs = [chat.submit("hello", "base", False, 0, 0, 0, 0, 5, api_name="/chat")
                for chat in clients]
        failed = [job.exception(timeout=60) for job in jobs]
    assert 1 <= sum(error is None for error in failed) <= 3
    assert all("ueue" in str(error) or "busy" in str(error) for error in failed if error)


@needs_gradio
def test_an_answer_that_nobody_fetches_ends(lm, monkeypatch):
    """Or the server would keep every update of it; one that is fetched is written to its end."""
    wrote, ended = [], threading.Event()

    def generate(*_):
        try:
            for i in range(300):
                time.sleep(0.01)
                wrote.append(i)
                yield step(f" w{i}")
        finally:
            ended.set()

    monkeypatch.setattr(app, "generate", generate)
    monkeypatch.setattr(app, "EVERY_S", 0.0)
    monkeypatch.setattr(app, "UNREAD", 40)
    content = {"data": ["ba den", "base", False, 0.5, 0.5, 0.8, 50, 300]}
    with serving(lm) as address:
        asked = urllib.request.Request(f"{address}gradio_api/call/chat",
                                       data=json.dumps(content).encode(),
                                       headers={"content-type": "application/json"})
        urllib.request.urlopen(asked).close()
        assert ended.wait(timeout=60) and 20 < len(wrote) < 60
        past = client(address).predict("hello", "base", False, 0, 0, 0, 0, 5, api_name="/chat")[0]
    assert "w299" in past


@needs_gradio
def test_what_nobody_fetches_is_kept_for_few_visitors(lm):
    """gradio would keep it for 2,000, whatever the page's queue."""
    content = json.dumps({"data": ["ba", "base", False, 0.5, 0.5, 0.8, 50, 1]}).encode()
    config = app.Config(port=free_port(), queue_size=2, concurrency=1)
    blocks = app.page(lm, config)
    try:
        address = app.serve(blocks, config)
        for _ in range(12):
            asked = urllib.request.Request(f"{address}gradio_api/call/chat", data=content,
                                           headers={"content-type": "application/json"})
            while True:
                try:
                    urllib.request.urlopen(asked).close()
                    break
                except urllib.error.HTTPError as error:
                    assert error.code == 503  # the queue is full
                    time.sleep(0.05)
        assert len(blocks._queue.pending_messages_per_session) == 6
    finally:
        blocks.close(verbose=False)


@needs_gradio
@pytest.mark.parametrize("route", ["run", "api"])
def test_no_request_gets_past_the_queue(lm, route):
    """A model that is asked there answers more visitors at once than `concurrency` allows."""
    content = {"data": [None, "ba den", "base", False, 0.5, 0.5, 0.8, 50, 5]}
    with serving(lm) as address:
        asked = urllib.request.Request(f"{address}gradio_api/{route}/chat",
                                       data=json.dumps(content).encode(),
                                       headers={"content-type": "application/json"})
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(asked)
    assert refused.value.code == 404


@needs_gradio
def test_server_limits_requests_and_names_no_other_machine(lm):
    with serving(lm) as address:
        with urllib.request.urlopen(address) as answer:
            page, policy = answer.read().decode(), answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'self'") and "http" not in policy
        loaded = re.findall(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="([^"]+)"', page)
        assert loaded and not [url for url in loaded if "//" in url]
        assert "fonts.g" not in page and "clamp(260px" in page  # of app.css
        huge = urllib.request.Request(address + "gradio_api/queue/join",
                                      data=b"x" * (app.MAX_REQUEST + 1))
        with pytest.raises((urllib.error.HTTPError, urllib.error.URLError, OSError)) as refused:
            urllib.request.urlopen(huge)
        assert getattr(refused.value, "code", 413) == 413
        file = urllib.request.Request(address + "gradio_api/upload", data=UPLOAD, headers={
            "content-type": "multipart/form-data; boundary=x"})
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(file)
        assert refused.value.code == 403


@pytest.mark.parametrize("path", ["/upload", "/gradio_api/upload/", "/gradio_api/deep_link"])
def test_paths_of_the_server_that_write_files_are_refused(path):
    """Before anything of their body is read; the page has no use for them."""
    sent, reached = [], []

    async def page(scope, receive, send):
        reached.append(scope["path"])

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": path, "headers": []}
    asyncio.run(app.Guard(page)(scope, None, send))
    assert sent[0]["status"] == 403 and reached == []
    asyncio.run(app.Guard(page)(scope | {"path": "/gradio_api/queue/join"}, None, send))
    assert reached == ["/gradio_api/queue/join"]


@pytest.mark.parametrize("headers", [[], [(b"content-length", b"10")], [(b"content-length", b"x")]])
def test_request_is_refused_when_too_much_of_it_has_arrived(headers):
    """Whatever its header says; and what the page makes of the rest is not sent."""
    sent, read = [], []

    async def endless():
        read.append(2**20)
        return {"type": "http.request", "body": bytes(2**20), "more_body": True}

    async def send(message):
        sent.append(message)

    async def page(scope, receive, send):
        while (await receive())["type"] != "http.disconnect":
            pass
        await send({"type": "http.response.start", "status": 200})
        raise ValueError("half a request")

    asyncio.run(app.Guard(page)({"type": "http", "headers": headers}, endless, send))
    assert sent[0]["status"] == 413 and sum(read) <= app.MAX_REQUEST + 2**20
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]


def test_log_is_one_cut_line_whoever_wrote_it():
    stream = io.StringIO()
    log = app.Log(stream)
    try:
        raise ValueError("x" * 4_000_000 + "\x1b[31m\n" + "y" * 1000)
    except ValueError:
        traceback.print_exc(file=log)
    print("a line", file=log)
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("failed: ValueError: xxx") and lines[-1] == "a line"
    assert len(lines) == 3 and all(len(line) <= app.LOG_LINE + 2 for line in lines)
    assert "Traceback" not in stream.getvalue() and "\x1b" not in stream.getvalue()


# ── the command ──────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("argv, said", [
    ("--port=0", "port = 0"), ("--host= ", "host"), ("--temperature=3", "from 0 to 2"),
    ("--top_k=-1", "top_k"), ("--queue_size=0", "above 0"), ("--host=256.1.1.1", "256.1.1.1"),
    ("--model_dir=/nowhere/at/all", "/nowhere/at/all")])
def test_mistakes_are_one_line(argv, said, capsys):
    assert app.main([f"--port={free_port()}", argv]) == 2
    assert said in error_line(capsys.readouterr().err)


def test_port_in_use_is_one_line_and_said_before_the_model_loads(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert app.main(["--port", str(port), "--model_dir", "/nowhere"]) == 2
    line = error_line(capsys.readouterr().err)
    assert f"port = {port}" in line and "127.0.0.1" in line and "--port" in line


def test_loopback_is_this_machine_alone():
    assert all(map(app.is_loopback, ("127.0.0.1", "::1", "localhost", "127.9.9.9")))
    assert not any(map(app.is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org")))


# Every connection that the process opens is written down.
WATCHED = """
import sys
def hook(event, args):
    if event == "socket.connect" and isinstance(args[1], tuple):
        print("CONNECT", args[1][0], file=sys.stderr, flush=True)
    if event == "socket.getaddrinfo" and args[0] not in (None, "127.0.0.1", "localhost", "0.0.0.0"):
        print("CONNECT", args[0], file=sys.stderr, flush=True)
    if event == "pickle.find_class":
        print("PICKLE", args, file=sys.stderr, flush=True)
sys.addaudithook(hook)
import runpy
runpy.run_path("app.py", run_name="__main__")
"""


@needs_gradio
def test_command_serves_until_stopped_and_speaks_to_nobody(model_flags, tmp_path):
    """It says that anyone on the network can read it, where it listens to others at all."""
    port = free_port()
    argv = [*model_flags, "--port", str(port), "--host", "0.0.0.0"]
    env = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    errors = tmp_path / "stderr"
    with errors.open("w") as err:
        server = subprocess.Popen([sys.executable, "-c", WATCHED, *argv], cwd=ROOT, text=True,
                                  stdout=subprocess.PIPE, stderr=err, env=env)
    try:
        said = []
        for line in server.stdout:
            said.append(line)
            if "the chat is at" in line:
                break
        assert "the chat is at" in said[-1], errors.read_text()
        view = client(f"http://127.0.0.1:{port}/").predict(
            "ba den fi", "both", True, 0.5, 0.5, 0, 0, 8, api_name="/chat")
        assert "ba den fi" in view[0]
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(timeout=60)
        server.stdout.close()
    assert code == 128 + signal.SIGTERM
    assert any(line.startswith("warning: 0.0.0.0") for line in said)
    log = errors.read_text()
    outside = {line.split()[1] for line in log.splitlines() if line.startswith("CONNECT")}
    assert outside <= {"127.0.0.1", "localhost", "0.0.0.0"}
    assert "PICKLE" not in log and "Traceback" not in log

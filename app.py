#!/usr/bin/env python3
"""Chat with a base model, its kNN datastore, its memory decoder, or both, and see what memory did.

    python app.py                              the page on http://127.0.0.1:7860
    python app.py --model_dir trained_models/  the folder that memory_decoder.py wrote
    python app.py --host 0.0.0.0 --port 8000   for other machines as well (a warning is printed)

Read downward; importing this file loads no model and starts nothing.
One MemoryLM is shared by everyone and only read; what belongs to one visitor is his Session.
The page asks no other machine for anything: own fonts, no analytics, and a header that says so.
"""

import dataclasses
import html
import ipaddress
import itertools
import json
import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import memory_decoder
from dnc_gpt2 import check_types, check_values, parse_overrides, print_help
from memory_decoder import MESSAGE_LIMIT, MemoryLM, Sampling, Step, chat_ids, generate

MODES = {"base": "base", "knn": "kNN-LM", "decoder": "memory decoder", "both": "both"}
MAX_TURNS = 100  # of one conversation: what one visitor can make the server remember
MAX_ROWS = 60  # changed tokens listed under an answer; the text marks all of them
MAX_REQUEST = 2**22  # bytes; the longest message is far below
EVERY_S = 0.08  # between two updates of the page; a fast model would flood the browser

# ══ Config ═══════════════════════════════════════════════════════════════════════════════════════
@dataclasses.dataclass(frozen=True)
class Config:
    """Every constant of the page. Edit here, or override as `--name value`."""

    # model
    model_dir: str = "trained_models/"  # what memory_decoder.py wrote
    base: str = "auto"  # auto (the one that it was made for) | where that base is now
    # answers: where the sliders stand at first; alpha stands at the value tuned on validation
    temperature: float = 0.8  # 0 = greedy, at most 2
    top_k: int = 50  # sample among so many tokens, 0 = all, at most 200
    max_new_tokens: int = 80  # length of an answer, at most 500
    # server
    host: str = "127.0.0.1"  # the address to listen on; anything else is open to other machines
    port: int = 7860  # a free port
    queue_size: int = 64  # visitors who may wait; the next one is told to come back
    concurrency: int = 4  # answers written at the same time

    def __post_init__(self) -> None:
        check_types(self)
        check_values(self, (
            ("model_dir base host", lambda x: x.strip(), "a name, not empty"),
            ("temperature", lambda x: 0 <= x <= 2, "from 0 to 2"),
            ("top_k", lambda x: 0 <= x <= 200, "from 0 to 200"),
            ("max_new_tokens", lambda x: 1 <= x <= 500, "from 1 to 500"),
            ("port", lambda x: 1 <= x < 2**16, "from 1 to 65535"),
            ("queue_size concurrency", lambda x: x > 0, "above 0")))

# ══ Text to HTML: everything that a model or a visitor wrote passes through `safe` ═══════════════
def safe(text: str) -> str:
    """Text as HTML shows it, character for character."""
    return html.escape(text, quote=True)

def visible(token: str) -> str:
    """A token as HTML on one line, white space made visible where there is nothing else in it."""
    shown = token.strip() or token.replace(" ", "␣")
    return safe(shown.replace("\n", "⏎") or "(part of a character)")

def percent(probability: float) -> str:
    """0.1234 -> 12 %, with one digit below ten and a bound where that would say 0."""
    if 0 < probability < 0.001:
        return "&lt; 0.1 %"
    return f"{100 * probability:.{0 if probability >= 0.0995 else 1}f} %"

class Answer:
    """An answer while it is written: its steps, its text, and its HTML with changes marked."""

    def __init__(self, mode: str) -> None:
        self.mode, self.steps, self.text, self.marked, self.pending = mode, [], "", [], False

    def add(self, step: Step) -> None:
        """Append a step; a change in the middle of a character is marked when that is whole."""
        self.steps.append(step)
        self.text += step.text
        self.pending |= step.changed
        if step.text:
            shown = safe(step.text)
            if self.pending:
                word = step.text.lstrip() or step.text  # the space before a word is not marked
                shown = (step.text.removesuffix(word) + '<mark title="the base alone: '
                         f'{visible(step.base_token)}">{safe(word)}</mark>')
            self.marked.append(shown)
            self.pending = False

    def to_html(self, heading: bool, live: bool) -> str:
        """The answer as HTML; `heading` names its mode, `live` says that it is being written."""
        body = "".join(self.marked)
        if not body:
            body = '<span class="quiet">' + ("…" if live else "(no answer)") + "</span>"
        head = f"<h4>{MODES[self.mode]}</h4>" if heading else ""
        return f'<div class="answer{" live" if live else ""}">{head}<p>{body}</p></div>'

def turn_html(text: str, answers: list[Answer], live: bool) -> str:
    """A turn: what the visitor said, and the answers below it, side by side if there are two."""
    columns = "".join(answer.to_html(len(answers) > 1, live) for answer in answers)
    side = " beside" if len(answers) > 1 else ""
    return f'<div class="said"><p>{safe(text)}</p></div><div class="answers{side}">{columns}</div>'

def changed_row(step: Step) -> str:
    """One changed token: what the base alone would have said, and whose neighbours it was."""
    heaviest = max((n.weight for n in step.neighbours), default=1) or 1  # fills the bar
    near = "".join(
        f'<li><span>…{safe(n.context.replace(chr(10), "⏎"))}<b>{safe(n.token)}</b></span>'
        f'<span class="weight" style="--w:{100 * n.weight / heaviest:.0f}%">'
        f"{percent(n.weight)}</span></li>"
        for n in step.neighbours) or '<li class="quiet">none</li>'
    return (f"<tr><td data-name='with memory'><mark>{visible(step.text)}</mark></td>"
            f"<td data-name='base alone'>{visible(step.base_token)}</td>"
            f"<td data-name='probability'>{percent(step.base_probability)} → "
            f"{percent(step.probability)}</td><td data-name='neighbours'><ul>{near}</ul></td></tr>")

def evidence_html(answer: Answer) -> str:
    """What memory changed in an answer: the tokens, the base's choices, the neighbours."""
    changed = [step for step in answer.steps if step.changed]
    if answer.mode == "base" or not answer.steps:
        return ""
    head = (f"<h3>What memory changed</h3><p>{MODES[answer.mode]}: {len(changed)} of "
            f"{len(answer.steps)} tokens")
    if not changed:
        return f"{head}. The base alone would have said the same.</p>"
    rest = f" The first {MAX_ROWS} are listed." if len(changed) > MAX_ROWS else ""
    rows = "".join(map(changed_row, changed[:MAX_ROWS]))
    return (f"{head} are not what the base alone would have said there, with the same random draw."
            f"{rest}</p><div class='rows'><table><thead><tr><th>with memory</th><th>base alone</th>"
            "<th>its probability: base → memory</th><th>places in the datastore, those that said "
            f"it first, and their weight</th></tr></thead><tbody>{rows}</tbody></table></div>")

# ══ A conversation ═══════════════════════════════════════════════════════════════════════════════
EMPTY = '<p class="quiet">Write a message below; the answer appears here word by word.</p>'
WAITING = '<p class="quiet waiting">Waiting for a free place …</p>'
REFUSED = ("The server did not take the message: too many people are waiting, the message is far "
           "too long, or the server is gone.")

@dataclasses.dataclass
class Draft:
    """The turn that is being written; also the sign of which run may write into the session."""

    text: str
    answers: list[Answer]  # the last one is the chosen mode's, which the conversation goes on with
    wish: str = ""  # stop | clear: what the run shall do at its next token

@dataclasses.dataclass
class Session:
    """All that belongs to one visitor: message dicts for the model, finished turns as HTML."""

    messages: list[dict] = dataclasses.field(default_factory=list)
    turns: list[str] = dataclasses.field(default_factory=list)
    draft: Draft | None = None

    def past(self) -> str:
        """The finished turns, as HTML."""
        return "".join(self.turns) or EMPTY

    def finish(self) -> str:
        """Keep the draft as a turn, whole or stopped -> what memory changed in it, as HTML. An
        answer without a word is shown but not remembered: the next prompt could not hold it."""
        draft, self.draft = self.draft, None
        if draft is None:
            return ""
        self.turns.append(turn_html(draft.text, draft.answers, live=False))
        if draft.answers[-1].text.strip():
            self.messages += [{"role": "user", "content": draft.text},
                              {"role": "assistant", "content": draft.answers[-1].text}]
        return evidence_html(draft.answers[-1])

    def clear(self) -> None:
        """Forget everything."""
        self.messages, self.turns, self.draft = [], [], None

class View(NamedTuple):
    """The outputs of every event of the page, in the order of its components."""

    past: str  # finished turns, HTML
    live: str = ""  # the turn being written, HTML
    evidence: str = ""  # what memory changed, HTML
    notice: str = ""  # one sentence to the visitor, HTML
    box: object = ""  # what the message box holds

def notice_html(text: str, kind: str = "info") -> str:
    """A sentence to the visitor; kind info | error."""
    return f'<p class="{kind}" role="status">{safe(text)}</p>' if text else ""

def converse(lm: MemoryLM, session: Session, text: str, sampling: Sampling, beside: bool,
             unchanged: object) -> Iterator[View]:
    """Answer a message, a View at a time. What cannot be answered becomes a sentence in the page,
    and the message box is left `unchanged`. Two answers are written token by token in turn."""
    text = text.encode("utf-8", "replace").decode()  # half a surrogate pair cannot be sent back
    session.finish()  # a visitor who asks again has stopped the answer before
    modes = ["base"] * (beside and sampling.mode != "base") + [sampling.mode]
    try:
        if not text.strip():
            raise ValueError("The message is empty: write something first.")
        if len(text) > MESSAGE_LIMIT:
            raise ValueError(f"The message has {len(text):,} characters; at most "
                             f"{MESSAGE_LIMIT:,} are taken.")
        if len(session.turns) >= MAX_TURNS:
            raise ValueError(f"This conversation has {MAX_TURNS} turns: clear it to go on.")
        messages = [*session.messages, {"role": "user", "content": text}]
        ids, left_out = chat_ids(lm, messages, min(sampling.max_new_tokens, lm.window // 2))
        streams = [generate(lm, ids, sampling._replace(mode=mode)) for mode in modes]
    except ValueError as error:
        yield View(session.past(), notice=notice_html(str(error), "error"), box=unchanged)
        return
    told = notice_html(f"Messages left out of the prompt, oldest first: {left_out}. The window of "
                       f"the base has {lm.window:,} tokens." if left_out else "")
    draft = session.draft = Draft(text, [Answer(mode) for mode in modes])
    past, sent = "".join(session.turns), time.monotonic()
    try:
        yield View(past, turn_html(text, draft.answers, live=True), notice=told)
        for steps in itertools.zip_longest(*streams):
            if draft.wish or session.draft is not draft:  # stopped, cleared, or asked again
                break
            for answer, step in zip(draft.answers, steps, strict=True):
                if step is not None:
                    answer.add(step)
            if time.monotonic() - sent >= EVERY_S:
                yield View(past, turn_html(text, draft.answers, live=True), notice=told)
                sent = time.monotonic()
    except (ValueError, RuntimeError, MemoryError, OSError) as error:
        print(f"error: {error!r} in an answer of {sampling.mode}", file=sys.stderr)
        told = notice_html("The model could not go on with this answer.", "error")
    finally:
        for stream in streams:
            stream.close()
        mine = session.draft is draft
        found = session.finish() if mine else ""  # also where the visitor has gone
    if draft.wish == "clear":
        session.clear()
        found = told = ""
    if mine:  # the run has the last word: a view by another event could overtake it or be overtaken
        yield View(session.past(), evidence=found, notice=told)

# ══ The page ═════════════════════════════════════════════════════════════════════════════════════
CSS = """
:root { --mark: #ffe29a; --mark-ink: #3d2a00; --bad: #fff1e8; --bad-ink: #7c2d12; --fill: #d3dafe; }
.dark { --mark: #6b4e00; --mark-ink: #fff3d0; --bad: #43190a; --bad-ink: #fed7aa; --fill: #3b3f8f; }
body { --line: var(--border-color-primary); --soft: var(--body-text-color-subdued); }
footer, #page [data-testid="status-tracker"] { display: none !important; }
.gradio-container { width: 100%; max-width: 1240px !important; margin: 0 auto !important; }
.gradio-container .main { padding: 14px 20px !important; }
.gradio-container main, .html-container { padding: 0 !important; }
#head h1 { font-size: 1.35rem; font-weight: 650; margin: 0 0 2px; }
#head p, #about p, .quiet { color: var(--soft); margin: 0; }
#about p { margin-bottom: 6px; font-size: .85rem; }
#page { display: grid !important; grid-template-columns: minmax(0, 1fr) 290px; gap: 20px; }
#page > * { min-width: 0 !important; gap: 10px !important; }
#choice { align-items: center; gap: 8px 24px; }
#choice > * { flex: 0 1 auto; width: auto !important; min-width: 0 !important; margin: 0;
  padding: 0; border: 0 !important; background: none; }
#mode input:checked { background-color: var(--color-accent) !important; }
/* reversed: stays at the bottom while text arrives, unless the reader has scrolled up */
#log { display: flex; flex-direction: column-reverse; flex-wrap: nowrap; overflow-y: auto;
  height: clamp(260px, calc(100dvh - 310px), 620px); padding: 14px 16px; border-radius: 10px;
  border: 1px solid var(--line); background: var(--block-background-fill); }
#log > * { margin-bottom: auto; flex: none; width: 100%; gap: 0 !important; }
#log p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.6; }
.said { display: flex; justify-content: flex-end; margin: 6px 0 12px; }
.said p { max-width: 85%; padding: 8px 14px; border-radius: 14px 14px 3px 14px;
  background: var(--color-accent-soft); }
.answers { margin-bottom: 14px; display: grid; gap: 14px; grid-template-columns: minmax(0, 1fr); }
.answers.beside { grid-template-columns: repeat(2, minmax(0, 1fr)); }
.answer { border-left: 3px solid var(--line); padding-left: 12px; }
.answer.live { border-left-color: var(--color-accent); }
.answer h4 { margin: 0 0 4px; font-size: .8rem; font-weight: 600; color: var(--soft); }
.waiting { opacity: 0; animation: appear .3s .6s forwards; } /* unseen where there is no wait */
#page:has(.waiting) #stop, #page:has(.waiting) #clear { display: none; }
#page:not(:has(.waiting)) #leave { display: none; }
@keyframes appear { to { opacity: 1; } }
mark { background: var(--mark); color: var(--mark-ink); border-radius: 3px; padding: 1px 0;
  box-decoration-break: clone; -webkit-box-decoration-break: clone; }
#notice p { margin: 0; padding: 8px 12px; border-radius: 8px; overflow-wrap: anywhere;
  background: var(--background-fill-secondary); border: 1px solid var(--line); }
#notice p.error { border-color: #c2410c; background: var(--bad); color: var(--bad-ink); }
#composer { align-items: flex-end; gap: 8px; }
#composer button { flex: 0 0 auto; min-width: 84px !important; }
#found { grid-column: 1 / -1; }
#found h3 { font-size: 1.05rem; margin: 4px 0 2px; }
#found .rows { max-height: 70dvh; overflow-y: auto; margin-top: 8px; }
#found table { width: 100%; border-collapse: collapse; margin: 0; table-layout: fixed; }
#found table, #found tr, #found th, #found td { border: 0 !important; }
#found td { border-top: 1px solid var(--line) !important; }
#found th, #found td { padding: 7px 12px 7px 2px; vertical-align: top; text-align: left;
  overflow-wrap: anywhere; }
#found th { font-size: .8rem; color: var(--soft); font-weight: 600; position: sticky; top: 0;
  background: var(--body-background-fill); }
#found th:nth-child(-n+3) { width: 16%; }
#found ul { list-style: none; margin: 0; padding: 0; }
#found li { display: flex; gap: 12px; justify-content: space-between; margin: 0 0 2px; }
#found li span { min-width: 0; white-space: pre-wrap; }
mark, #found span, #found b { unicode-bidi: isolate; } /* a token cannot turn its neighbours */
#found .weight { flex: none; width: 120px; padding: 0 6px; text-align: right; border-radius: 4px;
  background: linear-gradient(to right, var(--fill) var(--w), transparent var(--w)); }
@media (max-width: 760px) {
  .gradio-container .main { padding: 10px 12px !important; }
  #page, .answers.beside { grid-template-columns: minmax(0, 1fr); gap: 14px; }
  #log { height: 44dvh; padding: 10px 12px; }
  #composer > :first-child { flex: 1 0 100%; }
  #composer button { flex: 1 1 0; }
  #found { order: 1; }
  #settings { order: 2; }
  #found thead, #found td:last-child::before { display: none; }
  #found tr, #found td { display: block; padding: 1px 0; }
  #found td + td { border-top: 0 !important; }
  #found td:first-child { padding-top: 8px; }
  #found td::before { content: attr(data-name); color: var(--soft); display: inline-block;
    min-width: 100px; }
  #found td:last-child { font-size: .85rem; margin-bottom: 8px; }
  #found .weight { width: 70px; }
}
"""

def heading_html(lm: MemoryLM) -> str:
    """The title, and which model this is."""
    return (f"<h1>Chat with a memory</h1><p>{safe(lm.name)}. Words that memory changed are "
            "<mark>marked</mark>.</p>")

def about_html(lm: MemoryLM) -> str:
    """What the visitor should know: what the model is, what was tuned, what is compared."""
    tuned = ", ".join(f"{name} {lm.settings[name]:.3g}" for name in ("lambda", "tau", "k", "alpha")
                      if name in lm.settings)
    missing = ", ".join(MODES[mode] for mode in MODES if mode not in lm.modes())
    lines = (missing and f"Not in this folder: {missing}.",
             not getattr(lm.tokenizer, "chat_template", None) and "This base was not trained to "
             "chat: it goes on writing from your message.",
             f"Window: {lm.window:,} tokens. Tuned on validation: {tuned}.",
             "Beside the base: both get the same prompt, and the conversation goes on with the "
             "chosen mode's answer. The same conversation with the same settings gets the same "
             "answers.")
    return "".join(f"<p>{safe(line)}</p>" for line in lines if line)

def tuned_alpha(lm: MemoryLM, mode: str) -> float:
    """The weight of memory that was tuned for a mode; in mode knn it is called lambda."""
    settings = {**lm.settings, **(lm.settings.get("both", {}) if mode == "both" else {})}
    return float(settings.get("lambda" if mode == "knn" else "alpha", 0.5))

def controls(gr, lm: MemoryLM, config: Config) -> list:
    """The sliders and what is said about them -> [alpha, temperature, top-k, length]."""
    best = lm.modes()[-1]
    sliders = [
        gr.Slider(0, 1, tuned_alpha(lm, best), step=0.01, label="alpha", elem_id="alpha",
                  info="weight of memory; a mode sets the tuned one"),
        gr.Slider(0, 2, config.temperature, step=0.05, label="temperature", elem_id="temperature",
                  info="0 = greedy"),
        gr.Slider(0, 200, config.top_k, step=1, label="top-k", elem_id="top_k",
                  info="candidates; 0 = all"),
        gr.Slider(1, 500, config.max_new_tokens, step=1, label="max new tokens",
                  elem_id="max_new_tokens", info="longest answer")]
    gr.HTML(about_html(lm), elem_id="about")
    return sliders

def page(lm: MemoryLM, config: Config):
    """The page as gr.Blocks, around one model. Nothing is served yet."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio as gr
    except ImportError:
        raise OSError("the page needs gradio: pip install -r requirements.txt") from None

    def send(session, text, mode, beside, alpha, temperature, top_k, max_new_tokens):
        sampling = Sampling(mode, float(alpha), float(temperature), int(top_k),
                            int(max_new_tokens), seed=len(session.turns))
        yield from converse(lm, session, text, sampling, beside, gr.skip())

    def stop(session):
        if session.draft:
            session.draft.wish = "stop"

    def leave(session):
        return View(session.past(), box=gr.skip())

    def clear(session):
        if session.draft:
            session.draft.wish = "clear"
            return [gr.skip()] * len(View._fields)
        session.clear()
        return View(session.past())

    with gr.Blocks(title="Chat with a memory", analytics_enabled=False) as blocks:
        session = gr.State(Session())  # copied for each visitor
        gr.HTML(heading_html(lm), elem_id="head")
        with gr.Row(elem_id="page"):
            with gr.Column(elem_id="chat"):
                with gr.Row(elem_id="choice"):
                    mode = gr.Radio([(MODES[name], name) for name in lm.modes()], elem_id="mode",
                                    value=lm.modes()[-1], label="answer with", container=False)
                    beside = gr.Checkbox(False, label="beside the base", elem_id="beside",
                                         container=False)
                with gr.Column(elem_id="log"), gr.Column():
                    past, live = gr.HTML(EMPTY, elem_id="past"), gr.HTML(elem_id="live")
                notice = gr.HTML(elem_id="notice")
                with gr.Row(elem_id="composer"):
                    box = gr.Textbox(placeholder="Write a message", lines=1, max_lines=6, scale=1,
                                     label="message", container=False, elem_id="box",
                                     autofocus=True)
                    sent = gr.Button("Send", variant="primary", elem_id="send")
                    stopped = gr.Button("Stop", elem_id="stop")
                    left = gr.Button("Stop waiting", elem_id="leave")
                    cleared = gr.Button("Clear", elem_id="clear")
            with gr.Column(elem_id="settings"):
                sliders = controls(gr, lm, config)
            found = gr.HTML(elem_id="found")
        view = [past, live, found, notice, box]
        quiet = dict(queue=False, show_progress="hidden")
        asked = [sent.click, box.submit]
        gr.on(asked, None, None, live, js=f"() => {json.dumps(WAITING)}", **quiet)
        run = gr.on(asked, send, [session, box, mode, beside, *sliders], view,
                    api_name="chat", concurrency_limit=config.concurrency, trigger_mode="once",
                    show_progress="hidden")
        refused = json.dumps(["", notice_html(REFUSED, "error")])  # a stopped run fails as well
        same = json.dumps([gr.skip()] * 2)
        run.failure(None, None, [live, notice], **quiet, js="() => document.querySelector("
                    f"'#live .waiting') ? {refused} : {same}")
        stopped.click(stop, session, None, api_name="stop", **quiet)
        cleared.click(clear, session, view, api_name="clear", **quiet)
        left.click(leave, session, view, cancels=run, api_visibility="private", **quiet)
        tuned = json.dumps({name: tuned_alpha(lm, name) for name in lm.modes()})
        mode.change(None, mode, sliders[0], js=f"mode => ({tuned})[mode]", **quiet)
    return blocks.queue(max_size=config.queue_size)

# ══ The server ═══════════════════════════════════════════════════════════════════════════════════
class Guard:
    """ASGI middleware: no request of more than MAX_REQUEST bytes, and a header by which the browser
    itself refuses to ask any other machine for anything."""

    POLICY = b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; form-action 'self'"

    def __init__(self, app: Callable) -> None:
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []),
                                      (b"content-security-policy", self.POLICY)]
            await send(message)

        size = dict(scope.get("headers", [])).get(b"content-length", b"0")
        if scope["type"] == "http" and size.isdigit() and int(size) > MAX_REQUEST:
            await send({"type": "http.response.start", "status": 413,
                        "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"the request is too large"})
            return
        await self.app(scope, receive, send_with_policy)

def check_port(config: Config) -> None:
    """Raise OSError, in one line, unless the address can be listened on."""
    try:
        family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            probe.bind((config.host, config.port))
    except OSError as error:
        raise OSError(f"port = {config.port}: cannot listen on {config.host}:{config.port} "
                      f"({error.strerror or error}); choose another --port or --host") from None

def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

def serve(blocks, config: Config) -> str:
    """Start serving in the background -> the address. Raises OSError."""
    import gradio as gr
    from starlette.middleware import Middleware
    subdued = dict.fromkeys(("body_text_color_subdued", "block_info_text_color"), "*neutral_600")
    theme = gr.themes.Default(primary_hue="indigo", neutral_hue="slate",  # the visitor's own fonts
                              font=["system-ui", "sans-serif"], font_mono=["monospace"])
    theme = theme.set(**subdued, **{f"{name}_dark": "*neutral_400" for name in subdued})
    _, address, _ = blocks.launch(
        server_name=config.host, server_port=config.port, share=False, quiet=True, css=CSS,
        theme=theme, prevent_thread_lock=True, footer_links=[], run_history=False, ssr_mode=False,
        mcp_server=False, pwa=False, inbrowser=False, max_file_size=1, max_threads=40,
        enable_monitoring=False, app_kwargs={"middleware": [Middleware(Guard)]})
    return address

def load(config: Config) -> MemoryLM:
    """The model of model_dir, read as it was made. Raises ValueError or FileNotFoundError."""
    made = memory_decoder.Config(model_dir=config.model_dir, base=config.base)
    manifest = memory_decoder.read_manifest(made)
    as_made = {name: manifest[name] for name in ("window", "key") if name in manifest}
    return MemoryLM.load(dataclasses.replace(made, **as_made))

def main(argv: list[str]) -> int:
    """Run a command line -> exit code: 0, 2 a user's mistake, 130 or 143 stopped by a signal."""
    if {"-h", "--help"} & set(argv):
        print_help(Config, __doc__, {}, "edit or override")
        return 0

    def stop(number, frame):
        raise KeyboardInterrupt(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    blocks = None
    try:
        config = Config(**parse_overrides(Config, argv))
        check_port(config)
        lm = load(config)
        blocks = page(lm, config)
        address = serve(blocks, config)
        if not is_loopback(config.host):
            print(f"warning: {config.host} is open to other machines, and anyone who reaches it "
                  "can use this page; --host 127.0.0.1 keeps it to this one", flush=True)
        print(f"{lm.name}: {', '.join(MODES[mode] for mode in lm.modes())}\n"
              f"the chat is at {address} (Ctrl-C stops it)", flush=True)
        threading.Event().wait()
    except KeyboardInterrupt as stopped:
        print("\nstopped; the same command starts it again:\n  python app.py " + shlex.join(argv),
              file=sys.stderr)
        return 128 + int(str(stopped) or signal.SIGINT)
    except (ValueError, OSError, MemoryError) as error:
        print(f"error: {str(error) or 'out of memory'}", file=sys.stderr)
        return 2
    finally:
        if blocks is not None:
            blocks.close(verbose=False)
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: threads of the server and of PyTorch are still there, and one that meets the
    # interpreter while it is taken down may abort the process (seen once: "terminate called").
    os._exit(code)

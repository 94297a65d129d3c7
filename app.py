#!/usr/bin/env python3
"""Chat with a base model, its kNN datastore, its memory decoder, or both, and see what memory did.

    python app.py                              the page on http://127.0.0.1:7860
    python app.py --model_dir trained_models/  the folder that memory_decoder.py wrote
    python app.py --host 0.0.0.0 --port 8000   for other machines as well (a warning is printed)

Read downward; importing this file loads no model and starts nothing.
One MemoryLM is shared by everyone and only read; what belongs to one visitor is his Session.
Once it serves, the page asks no other machine for anything: own fonts, no analytics, and a header
that says so. Only a base with a hub name is asked of the hub, while it loads.
"""

import contextlib
import dataclasses
import html
import io
import ipaddress
import itertools
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

if __name__ == "__main__" and not hasattr(sys, "ps1"):  # until main listens: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# isort: off
from dnc_gpt2 import (
    # types of Config fields, and checks
    Bound,
    Count,
    check_fields,
    require_field,
    # command
    StopSignal,
    one_line,
    print_any_character,
    read_config,
    run_command,
)
# isort: on
from memory_lm import MESSAGE_LIMIT, MemoryLM, Neighbour, Sampling, Step, chat_ids, generate

MODES = {"base": "base", "knn": "kNN-LM", "decoder": "memory decoder", "both": "both"}
MAX_TURNS = 100  # of one conversation: what one visitor can make the server remember
MAX_SESSIONS = 500  # conversations that the server keeps; the one not used longest is forgotten
MAX_ROWS = 60  # changed tokens listed under an answer; the text marks all of them
MAX_REQUEST = 2**22  # bytes; the longest message is far below
UNUSED = ("/upload", "/deep_link")  # ends of the paths that write files; the page needs none
LOG_LINE = 300  # characters of a line on stderr, whoever wrote what is in it
UNREAD = 100  # updates that wait for a browser; behind them an answer ends, some 8 s of a slow line
BLANK_TOKENS = 16  # of white space alone, after which an answer ends
EVERY_S = 0.08  # between two updates of the page; a fast model would flood the browser
STYLE = Path(__file__).with_name("app.css")

Temperature = Annotated[float, Bound("from 0 to 2", lambda x: 0 <= x <= 2)]
TopK = Annotated[int, Bound("from 0 to 200", lambda x: 0 <= x <= 200)]
Length = Annotated[int, Bound("from 1 to 500", lambda x: 1 <= x <= 500)]
Port = Annotated[int, Bound("from 1 to 65535", lambda x: 1 <= x < 2**16)]


# ══ Config ═══════════════════════════════════════════════════════════════════════════════════════
@dataclasses.dataclass(frozen=True)
class Config:
    """Every constant of the page. Edit here, or override as `--name value`."""

    # model
    model_dir: str = "trained_models/"  # what memory_decoder.py wrote
    base: str = "auto"  # auto (the one that it was made for) | where that base is now
    # answers: where the sliders stand at first; alpha and lambda stand at the tuned values
    temperature: Temperature = 0.8  # 0 = greedy, at most 2
    top_k: TopK = 50  # sample among so many tokens, 0 = all, at most 200
    max_new_tokens: Length = 80  # length of an answer, at most 500
    # server
    host: str = "127.0.0.1"  # the address to listen on; anything else is open to other machines
    port: Port = 7860  # a free port
    queue_size: Count = 64  # visitors who may wait; the next one is told to come back
    concurrency: Count = 4  # answers written at the same time

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("model_dir", "base", "host"):
            require_field(self, name, getattr(self, name).strip() != "", "a name, not empty")


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
        self.mode = mode
        self.steps: list[Step] = []
        self.text = ""
        self.marked: list[str] = []  # HTML of each step that has text
        self.is_changed = False  # since the last of them

    def add(self, step: Step) -> None:
        """Append a step; a change in the middle of a character is marked when that is whole."""
        self.steps.append(step)
        self.text += step.text
        self.is_changed |= step.changed
        if step.text:
            shown = safe(step.text)
            if self.is_changed:
                word = step.text.lstrip() or step.text  # the space before a word is not marked
                shown = (step.text.removesuffix(word) + '<mark title="the base alone: '
                         f'{visible(step.base_token)}">{safe(word)}</mark>')
            self.marked.append(shown)
            self.is_changed = False

    @property
    def is_stuck(self) -> bool:
        """Whether it has been writing nothing but white space for a while."""
        last = self.steps[-BLANK_TOKENS:]
        return len(last) == BLANK_TOKENS and not any(step.text.strip() for step in last)

    @property
    def is_blank(self) -> bool:
        """Whether it ended without a word."""
        return not self.text.strip()

    def to_html(self, heading: bool, live: bool) -> str:
        """The answer as HTML; `heading` names its mode, `live` says that it is being written."""
        body = "".join(self.marked)
        if not body:
            body = '<span class="quiet">' + ("…" if live else "(no answer)") + "</span>"
        head = f"<h4>{MODES[self.mode]}</h4>" if heading else ""
        state = " live" if live else ""
        return f'<div class="answer{state}">{head}<p>{body}</p></div>'


def turn_html(text: str, answers: list[Answer], live: bool) -> str:
    """A turn: what the visitor said, and the answers below it, side by side if there are two."""
    columns = "".join(answer.to_html(len(answers) > 1, live) for answer in answers)
    side = " beside" if len(answers) > 1 else ""
    return f'<div class="said"><p>{safe(text)}</p></div><div class="answers{side}">{columns}</div>'


def neighbour_item(neighbour: Neighbour, heaviest: float) -> str:
    """A place in the datastore as an item of a list; its bar is full at the heaviest weight."""
    context = safe(neighbour.context.replace("\n", "⏎"))
    said = f"…{context}<b>{safe(neighbour.token)}</b>"
    weight = (f'<span class="weight" style="--w:{100 * neighbour.weight / heaviest:.0f}%">'
              f"{percent(neighbour.weight)}</span>")
    if not neighbour.place:
        return f"<li><span>{said}</span>{weight}</li>"
    before, behind = map(safe, neighbour.passage)
    return (f"<li><details><summary>{said} <cite>{safe(neighbour.place)}</cite></summary>"
            f"<pre>{before}<mark>{safe(neighbour.token)}</mark>{behind}</pre></details>{weight}"
            "</li>")


def changed_row(step: Step) -> str:
    """One changed token: what the base alone would have said, and whose neighbours it was."""
    heaviest = max((neighbour.weight for neighbour in step.neighbours), default=1) or 1
    items = [neighbour_item(neighbour, heaviest) for neighbour in step.neighbours]
    near = "".join(items) or '<li class="quiet">none</li>'
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
BLANK = ("The model wrote nothing but blank lines. A temperature above 0, another mode, or less of "
         "the memory may help.")


# Of a model in the middle of an answer; an IndexError is a token that its base cannot look up.
FAILURES = (ValueError, IndexError, RuntimeError, MemoryError, OSError)


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
    """The outputs of every event of the page, in the order of `wire`."""

    past: str  # finished turns, HTML
    live: str = ""  # the turn being written, HTML
    evidence: str = ""  # what memory changed, HTML
    notice: str = ""  # one sentence to the visitor, HTML
    box: object = ""  # what the message box holds


def notice_html(text: str, kind: str = "info") -> str:
    """A sentence to the visitor; kind info | error."""
    return f'<p class="{kind}" role="status">{safe(text)}</p>' if text else ""


def prepare(lm: MemoryLM, session: Session, text: str, sampling: Sampling, modes: list[str]
            ) -> tuple[list[Iterator[Step]], int]:
    """Check a message -> the steps of an answer in each mode, and how many of the oldest messages
    the prompt leaves out. Raises ValueError, a sentence to the visitor."""
    if not text.strip():
        raise ValueError("The message is empty: write something first.")
    if len(text) > MESSAGE_LIMIT:
        raise ValueError(f"The message has {len(text):,} characters; at most {MESSAGE_LIMIT:,} are "
                         "taken.")
    if len(session.turns) >= MAX_TURNS:
        raise ValueError(f"This conversation has {MAX_TURNS} turns: clear it to go on.")
    messages = [*session.messages, {"role": "user", "content": text}]
    ids, left_out = chat_ids(lm, messages, min(sampling.max_new_tokens, lm.window // 2))
    return [generate(lm, ids, sampling._replace(mode=mode)) for mode in modes], left_out


def write_answers(session: Session, draft: Draft, streams: list[Iterator[Step]]) -> Iterator[None]:
    """Write the draft's answers token by token, in turn, until it is stopped, cleared, or asked
    again. Yields when the page is due for an update."""
    yield
    sent = time.monotonic()
    for steps in itertools.zip_longest(*streams):
        if draft.wish or session.draft is not draft:
            return
        for answer, step in zip(draft.answers, steps, strict=True):
            if step is not None and not answer.is_stuck:
                answer.add(step)
        if all(answer.is_stuck for answer in draft.answers):
            return
        if time.monotonic() - sent >= EVERY_S:
            yield
            sent = time.monotonic()


def left_out_html(lm: MemoryLM, left_out: int) -> str:
    """What a visitor is told of the messages that the prompt had no room for."""
    text = (f"Messages left out of the prompt, oldest first: {left_out}. The window of the base "
            f"has {lm.window:,} tokens.")
    return notice_html(text) if left_out else ""


def converse(lm: MemoryLM, session: Session, text: str, sampling: Sampling, beside: bool,
             unchanged: object) -> Iterator[View]:
    """Answer a message, a View at a time. What cannot be answered becomes a sentence in the page,
    and the message box is left `unchanged`."""
    text = text.encode("utf-8", "replace").decode()  # half a surrogate pair cannot be sent back
    session.finish()  # a visitor who asks again has stopped the answer before
    modes = list(dict.fromkeys(["base", sampling.mode])) if beside else [sampling.mode]
    try:
        streams, left_out = prepare(lm, session, text, sampling, modes)
    except ValueError as error:
        yield View(session.past(), notice=notice_html(str(error), "error"), box=unchanged)
        return

    told = left_out_html(lm, left_out)
    draft = session.draft = Draft(text, [Answer(mode) for mode in modes])
    past = "".join(session.turns)
    try:
        for _ in write_answers(session, draft, streams):
            yield View(past, turn_html(text, draft.answers, live=True), notice=told)
    except FAILURES as error:
        print(one_line(f"error: {error!r} in an answer of {sampling.mode}", LOG_LINE),
              file=sys.stderr)
        told = notice_html("The model could not go on with this answer.", "error")
    finally:
        for stream in streams:
            stream.close()
        is_ours = session.draft is draft
        evidence = session.finish() if is_ours else ""  # also where the visitor has gone

    if draft.wish == "clear":
        session.clear()
        evidence = told = ""
    if not draft.wish and draft.answers[-1].is_blank:
        told = told or notice_html(BLANK)
    if is_ours:  # the run has the last word: another event's view could overtake it
        yield View(session.past(), evidence=evidence, notice=told)


def unread() -> int:
    """Updates that wait for the browser of the visitor who is answered in this thread. gradio
    keeps every one until it is fetched."""
    from gradio.context import LocalContext

    blocks, request = LocalContext.blocks.get(None), LocalContext.request.get(None)
    if blocks is None or request is None:
        return 0
    waiting = blocks._queue.pending_messages_per_session.get(request.session_hash)
    return waiting.qsize() if waiting else 0


def while_read(views: Iterator[View]) -> Iterator[View]:
    """The views of an answer, for as long as somebody fetches them."""
    with contextlib.closing(views):
        while unread() <= UNREAD:
            view = next(views, None)
            if view is None:
                return
            yield view


# ══ The page ═════════════════════════════════════════════════════════════════════════════════════
def heading_html(lm: MemoryLM) -> str:
    """The title, and which model this is."""
    return (f"<h1>Chat with a memory</h1><p>{safe(lm.name)}. Words that memory changed are "
            "<mark>marked</mark>.</p>")


def about_html(lm: MemoryLM) -> str:
    """What the visitor should know: what the model is, what was tuned, what is compared."""
    names = ("lambda", "decay", "tau", "k", "alpha")
    tuned = ", ".join(f"{name} {lm.settings[name]:.3g}" for name in names if name in lm.settings)
    missing = ", ".join(MODES[mode] for mode in MODES if mode not in lm.modes())
    lines = []
    if missing:
        lines.append(f"Not in this folder: {missing}.")
    if not getattr(lm.tokenizer, "chat_template", None):
        lines.append("This base was not trained to chat: it goes on writing from your message.")
    lines.append(f"Window: {lm.window:,} tokens. Tuned on validation: {tuned}.")
    lines.append("Beside the base: both get the same prompt, and the conversation goes on with the "
                 "chosen mode's answer. The same conversation with the same settings gets the same "
                 "answers.")
    return "".join(f"<p>{safe(line)}</p>" for line in lines)


def controls(gr, lm: MemoryLM, config: Config) -> list:
    """The sliders and what is said about them -> [alpha, lambda, temperature, top-k, length]."""
    alpha, lambda_ = lm.tuned(lm.modes()[-1])
    sliders = [
        gr.Slider(0, 1, alpha, step=0.01, label="memory decoder (alpha)", elem_id="alpha",
                  info="0 = without it; in modes memory decoder and both"),
        gr.Slider(0, 1, lambda_, step=0.01, label="datastore (lambda)", elem_id="lambda",
                  info="0 = without it; less where its nearest passage is far; in modes kNN-LM and "
                       "both. Both 0: the base, word for word"),
        gr.Slider(0, 2, config.temperature, step=0.05, label="temperature", elem_id="temperature",
                  info="0 = greedy"),
        gr.Slider(0, 200, config.top_k, step=1, label="top-k", elem_id="top_k",
                  info="candidates; 0 = all"),
        gr.Slider(1, 500, config.max_new_tokens, step=1, label="max new tokens",
                  elem_id="max_new_tokens", info="longest answer")]
    gr.HTML(about_html(lm), elem_id="about")
    return sliders


# Of the embedded corpus, which python memory_decoder.py builds where no domain is named.
EXAMPLES = (
    "What does the pass statement do in Python?",
    "What is the difference between is and ==?",
    "When is the finally clause executed?",
)
# The last answer goes to the clipboard; pages of other machines without https have none.
COPY = """() => {
  const answers = document.querySelectorAll('#log .answer p');
  const button = document.querySelector('#copy');
  if (!answers.length || !navigator.clipboard) return;
  navigator.clipboard.writeText(answers[answers.length - 1].innerText);
  button.textContent = 'Copied';
  setTimeout(() => { button.textContent = 'Copy'; }, 1200);
}"""


def refusal_script(skip: object) -> str:
    """What the browser does where a run fails: it tells a visitor who was waiting, and leaves the
    answer and the notice of one who was not, as a stopped run fails as well."""
    refused = json.dumps(["", notice_html(REFUSED, "error")])
    same = json.dumps([skip, skip])
    return f"() => document.querySelector('#live .waiting') ? {refused} : {same}"


class Parts(NamedTuple):
    """The components of the page that events read and write."""

    session: object
    mode: object
    beside: object
    past: object
    live: object
    notice: object
    box: object
    sent: object
    stopped: object
    left: object  # "Stop waiting"
    cleared: object
    copied: object
    examples: list  # buttons
    sliders: list  # alpha, lambda, temperature, top-k, length
    found: object  # what memory changed


def example_buttons(gr, lm: MemoryLM) -> list:
    """A button for each question that a visitor may begin with; none for a domain of others."""
    if not re.search(r"\+ Python .* documentation$", lm.name):
        return []
    with gr.Row(elem_id="examples"):
        return [gr.Button(text, size="sm") for text in EXAMPLES]


def composer(gr) -> dict:
    """The message box and its buttons, by the names that they have in Parts."""
    with gr.Row(elem_id="composer"):
        return {
            "box": gr.Textbox(placeholder="Write a message", lines=1, max_lines=6, scale=1,
                              label="message", container=False, elem_id="box", autofocus=True),
            "sent": gr.Button("Send", variant="primary", elem_id="send"),
            "stopped": gr.Button("Stop", elem_id="stop"),
            "left": gr.Button("Stop waiting", elem_id="leave"),
            "copied": gr.Button("Copy", elem_id="copy"),
            "cleared": gr.Button("Clear", elem_id="clear"),
        }


def layout(gr, lm: MemoryLM, config: Config) -> Parts:
    """Lay out the page, inside the gr.Blocks that is open."""
    session = gr.State(Session())  # copied for each visitor
    gr.HTML(heading_html(lm), elem_id="head")
    with gr.Row(elem_id="page"):
        with gr.Column(elem_id="chat"):
            with gr.Row(elem_id="choice"):
                modes = lm.modes()
                mode = gr.Radio([(MODES[name], name) for name in modes], value=modes[-1],
                                label="answer with", container=False, elem_id="mode")
                beside = gr.Checkbox(False, label="beside the base", container=False,
                                     elem_id="beside")
            with gr.Column(elem_id="log"), gr.Column():
                past, live = gr.HTML(EMPTY, elem_id="past"), gr.HTML(elem_id="live")
            examples = example_buttons(gr, lm)
            notice = gr.HTML(elem_id="notice")
            written = composer(gr)
        with gr.Column(elem_id="settings"):
            sliders = controls(gr, lm, config)
        found = gr.HTML(elem_id="found")
    return Parts(session=session, mode=mode, beside=beside, past=past, live=live, notice=notice,
                 examples=examples, sliders=sliders, found=found, **written)


class Events:
    """What the page's buttons do, around one model. What they return are outputs of a View."""

    def __init__(self, lm: MemoryLM, skip: Callable) -> None:
        self.lm = lm
        self.skip = skip  # gr.skip: leave a component as it is

    def send(self, session, text, mode, beside, alpha, lambda_, temperature, top_k,
             max_new_tokens):
        """Answer a message; a generator."""
        sampling = Sampling(mode, float(alpha), float(lambda_), float(temperature), int(top_k),
                            int(max_new_tokens), seed=len(session.turns))
        yield from while_read(converse(self.lm, session, text, sampling, beside, self.skip()))

    def stop(self, session):
        """Let the answer that is being written end where it is."""
        if session.draft:
            session.draft.wish = "stop"

    def leave(self, session):
        """Give up a place in the queue; the message stays in its box."""
        return View(session.past(), box=self.skip())

    def clear(self, session):
        """Forget the conversation, at the next token of an answer that is being written."""
        if session.draft:
            session.draft.wish = "clear"
            return [self.skip()] * len(View._fields)
        session.clear()
        return View(session.past())


def wire(gr, lm: MemoryLM, config: Config, parts: Parts) -> None:
    """Let the components do something, inside the gr.Blocks that is open."""
    events = Events(lm, gr.skip)
    view = [parts.past, parts.live, parts.found, parts.notice, parts.box]  # of a View, in order
    quiet = dict(queue=False, show_progress="hidden")

    asked = [parts.sent.click, parts.box.submit]
    gr.on(asked, None, None, parts.live, js=f"() => {json.dumps(WAITING)}", **quiet)
    message = [parts.session, parts.box, parts.mode, parts.beside, *parts.sliders]
    run = gr.on(asked, events.send, message, view, api_name="chat", trigger_mode="once",
                concurrency_limit=config.concurrency, show_progress="hidden")
    run.failure(None, None, [parts.live, parts.notice], js=refusal_script(gr.skip()), **quiet)

    parts.stopped.click(events.stop, parts.session, None, api_name="stop", **quiet)
    parts.cleared.click(events.clear, parts.session, view, api_name="clear", **quiet)
    parts.left.click(events.leave, parts.session, view, cancels=run, api_visibility="private",
                     **quiet)
    in_browser(lm, parts, quiet)


def in_browser(lm: MemoryLM, parts: Parts, quiet: dict) -> None:
    """Wire what the browser does without asking the server."""
    tuned = json.dumps({name: lm.tuned(name) for name in lm.modes()})
    parts.mode.change(None, parts.mode, parts.sliders[:2], js=f"mode => ({tuned})[mode]", **quiet)
    parts.copied.click(None, None, None, js=COPY, **quiet)
    for button, text in zip(parts.examples, EXAMPLES, strict=False):
        button.click(None, None, parts.box, js=f"() => {json.dumps(text)}", **quiet)


def page(lm: MemoryLM, config: Config):
    """Make the page as gr.Blocks, around one model. Nothing is served yet. Raises OSError."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio as gr
    except ImportError:
        raise OSError("the page needs gradio: pip install -r requirements-all.txt") from None

    with gr.Blocks(title="Chat with a memory", analytics_enabled=False) as blocks:
        wire(gr, lm, config, layout(gr, lm, config))
    # api_open would let a caller of /run/chat past the queue, and so past `concurrency`
    blocks.queue(max_size=config.queue_size, api_open=False)
    # gradio keeps what nobody fetches, of its last 2,000 visitors
    at_once = config.queue_size + config.concurrency
    blocks._queue.pending_messages_per_session.max_size = 2 * at_once
    return blocks


# ══ The server ═══════════════════════════════════════════════════════════════════════════════════
class Guard:
    """ASGI middleware: no request of more than MAX_REQUEST bytes, as they arrive, whatever its
    header says; none that would write files; and a header by which the browser itself refuses to
    ask any other machine for anything."""

    POLICY = b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; form-action 'self'"

    def __init__(self, app: Callable) -> None:
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        received, is_begun, is_refused = 0, False, False

        async def refuse(status: int = 413, reason: bytes = b"the request is too large"):
            nonlocal is_refused
            is_refused = True
            if not is_begun:
                await send({"type": "http.response.start", "status": status, "headers": [
                    (b"content-type", b"text/plain"), (b"connection", b"close")]})
            await send({"type": "http.response.body", "body": reason})

        async def counted():
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_REQUEST and not is_refused:
                await refuse()
            return {"type": "http.disconnect"} if is_refused else message

        async def send_with_policy(message):
            nonlocal is_begun
            if is_refused:  # what the page makes of half a request interests nobody
                return
            if message["type"] == "http.response.start":
                is_begun = True
                message["headers"] = [*message.get("headers", []),
                                      (b"content-security-policy", self.POLICY)]
            await send(message)

        if scope.get("path", "").rstrip("/").endswith(UNUSED):
            await refuse(403, b"this page takes no files")
            return
        size = dict(scope.get("headers", [])).get(b"content-length", b"0")
        if scope["type"] == "http" and size.isdigit() and int(size[:20]) > MAX_REQUEST:
            await refuse()
            return
        try:
            await self.app(scope, counted, send_with_policy)
        except Exception:
            if not is_refused:
                raise


class Log(io.TextIOBase):
    """stderr of the server. The libraries of the page print what a visitor sent, with a traceback:
    here a traceback is its last line, and a line is cut."""

    def __init__(self, stream) -> None:
        self.stream = stream
        self.here = threading.local()  # of each thread: the line so far, whether in a traceback

    def write(self, text: str) -> int:
        begun = getattr(self.here, "line", "")
        *lines, rest = (begun + text).split("\n")
        self.here.line = rest[: 4 * LOG_LINE]
        for line in lines:
            self.write_line(line[: 4 * LOG_LINE])
        return len(text)

    def write_line(self, line: str) -> None:
        """Write a line, unless it stands inside a traceback."""
        words = line.strip(" |+-")
        if words.startswith(("Traceback (most recent", "Exception Group Traceback")):
            self.here.is_inside = True
            return
        is_inside = getattr(self.here, "is_inside", False)
        is_between = words.startswith(("During handling", "The above exception"))
        if not words or is_between or (is_inside and line.startswith((" ", "\t"))):
            return
        self.here.is_inside = False
        self.stream.write(one_line(("failed: " if is_inside else "") + line, LOG_LINE) + "\n")
        self.stream.flush()

    def flush(self) -> None:
        self.stream.flush()

    def isatty(self) -> bool:
        return self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()


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
        server_name=config.host, server_port=config.port, prevent_thread_lock=True, quiet=True,
        css=STYLE.read_text(encoding="utf-8"), theme=theme, footer_links=[],
        share=False, run_history=False, ssr_mode=False, mcp_server=False, pwa=False,
        inbrowser=False, enable_monitoring=False, max_file_size=1, max_threads=40,
        state_session_capacity=MAX_SESSIONS,
        app_kwargs={"middleware": [Middleware(Guard)]})
    return address


def run(config: Config) -> None:
    """Load the model and serve the page until a signal comes. Raises ValueError or OSError."""
    check_port(config)
    lm = MemoryLM.load(config.model_dir, config.base)
    blocks = page(lm, config)
    sys.stderr = Log(sys.stderr)
    try:
        address = serve(blocks, config)
        if not is_loopback(config.host):
            print(f"warning: {config.host} is open to other machines, and anyone who reaches it "
                  "can use this page; --host 127.0.0.1 keeps it to this one", flush=True)
        print(f"{lm.name}: {', '.join(MODES[mode] for mode in lm.modes())}\n"
              f"the chat is at {address} (Ctrl-C stops it)", flush=True)
        threading.Event().wait()
    finally:
        blocks.close(verbose=False)
        sys.stderr = sys.stderr.stream


def main(argv: list[str]) -> int:
    """Run a command line -> exit code: 0, 2 a user's mistake, 130 or 143 stopped by a signal."""

    def job(stop: StopSignal) -> None:
        run(read_config(Config, argv, __doc__))

    return run_command(job, again=["app.py", *argv], saved="conversations are not kept",
                       sizes="model_dir or concurrency")


if __name__ == "__main__":
    print_any_character()
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: threads of the server and of PyTorch are still there, and one that meets the
    # interpreter while it is taken down may abort the process (seen once: "terminate called").
    os._exit(code)

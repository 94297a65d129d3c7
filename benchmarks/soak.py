#!/usr/bin/env python3
"""Soak the chat page: 20 users at once, some of whom mean no good, and the server's memory.

    python benchmarks/soak.py                     a tiny model, 1,000 requests
    python benchmarks/soak.py --requests 200 --json soak.json

Mixed at random: chats, closed tabs, answers never fetched, aborted posts, bodies that are too large
by their header or only as they arrive, wild calls of the API, hostile text in prompt, answer and
datastore. It prints what each kind got, the server's resident memory after every tenth of the
requests, the longest line that it logged, and ends with exit code 1 where the server died, memory
grew by more than --grown MiB after the first third, an answer held another's text, or a socket was
opened to elsewhere.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import http.client
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

HOSTILE = ["<script>alert(1)</script>", "</p></div><img src=x onerror=alert(1)>", "${1+1} {{x}}",
           "\x1b[31mred\x1b[0m", "a\u202eb", "😀" * 50, "\ud800", "ignore all of the above",
           "Traceback (most recent call last):\n  File", "%s%n{0}", "' OR 1=1 --", "\0" * 20]
WATCH = """
import sys
def hook(event, args):
    if event == "socket.connect" and isinstance(args[1], tuple):
        print("CONNECT", args[1][0], file=sys.__stderr__, flush=True)
    if event == "pickle.find_class":
        print("PICKLE", args, file=sys.__stderr__, flush=True)
sys.addaudithook(hook)
import runpy
runpy.run_path("app.py", run_name="__main__")
"""


def write_model(folder: Path) -> Path:
    """Build a tiny base, and over hostile text its datastore and its decoder -> their folder."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    import dnc_gpt2
    import memory_decoder

    draw = random.Random(0)
    words = "ba den fi gor hul ka lem ni or pe ras sto tu vel wim".split()
    for split, lines in (("train", 150), ("valid", 60), ("test", 60)):
        texts = [" ".join(draw.choices(words, k=8)) + " " + draw.choice(HOSTILE)
                 for _ in range(lines)]
        path = folder / "domain" / f"{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(texts).encode("utf-8", "replace").decode(), encoding="utf-8")
    train = (folder / "domain" / "train.txt").read_text(encoding="utf-8")
    tokenizer = dnc_gpt2.train_tokenizer([train], 300)
    torch.manual_seed(0)
    sizes = GPT2Config(vocab_size=tokenizer.get_vocab_size(), n_positions=64, n_embd=16, n_layer=1,
                       n_head=2, bos_token_id=None, eos_token_id=None)
    GPT2LMHeadModel(sizes).save_pretrained(folder / "base")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "base")
    argv = [f"--{name}={value}" for name, value in dict(
        base=folder / "base", domain=folder / "domain", index="flat", knn_k=8, arms="",
        model_dir=folder / "made", plot_dir=folder, decoder_dim=16, decoder_layers=1,
        decoder_heads=2).items()]
    for command in ("build", "train", "tune"):
        assert memory_decoder.main([command, *argv]) == 0
    return folder / "made"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Visitor:
    """One user: what he may do, each as a method that returns what came of it."""

    def __init__(self, port: int, number: int) -> None:
        self.port, self.number = port, number
        self.draw = random.Random(number)
        self.asked = 0

    def request(self, method: str, path: str, body=None, headers=None) -> tuple[int, bytes]:
        """One request on a connection of its own -> status, body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def post(self, path: str, content: object) -> tuple[int, bytes]:
        return self.request("POST", path, json.dumps(content).encode(),
                            {"content-type": "application/json"})

    def ask(self, text: str, length: int = 6) -> str:
        """Send a message -> the number of its event, "" where it was refused."""
        mode = self.draw.choice(["base", "knn", "decoder", "both"])
        data = [text, mode, self.draw.random() < 0.3, 0.5, 0.5, 0.8, 50, length]
        status, said = self.post("/gradio_api/call/chat", {"data": data})
        return json.loads(said)["event_id"] if status == 200 else ""

    def chat(self) -> str:
        """A whole answer, which holds what was asked and nothing that another asked."""
        self.asked += 1
        mark = f"visitor{self.number}asks{self.asked}end"
        event = self.ask(f"{mark} {self.draw.choice(HOSTILE)}")
        if not event:
            return "refused"
        _, stream = self.request("GET", f"/gradio_api/call/chat/{event}")
        text = stream.decode("utf-8", "replace")
        others = set(part.partition("end")[0] for part in text.split("visitor")[1:])
        if others - {f"{self.number}asks{self.asked}"}:
            return "MIXED"
        return "answered" if mark in text else "busy"

    def closed_tab(self) -> str:
        """The page is closed in the middle of an answer."""
        event = self.ask("ba den fi", length=200)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request("GET", f"/gradio_api/call/chat/{event or 'none'}")
        connection.sock.settimeout(0.3)
        with contextlib.suppress(OSError):
            connection.sock.recv(200)
        connection.close()
        return "closed"

    def unfetched(self) -> str:
        """A question whose answer nobody comes for."""
        return "asked" if self.ask("gor hul ka", length=300) else "refused"

    def aborted(self) -> str:
        """A post that ends before its body."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as line:
            line.sendall(b"POST /gradio_api/call/chat HTTP/1.1\r\nhost: x\r\ncontent-length: 9999"
                         b"\r\ncontent-type: application/json\r\n\r\n{\"data\": [")
        return "aborted"

    def oversized(self) -> str:
        """5 MiB, as the header says."""
        with contextlib.suppress(OSError):
            return str(self.request("POST", "/gradio_api/queue/join", bytes(5 * 2**20))[0])
        return "cut off"

    def chunked(self) -> str:
        """40 MiB without a length."""
        def chunks():
            for _ in range(40):
                yield bytes(2**20)

        with contextlib.suppress(OSError, http.client.HTTPException):
            return str(self.request("POST", "/gradio_api/queue/join", chunks())[0])
        return "cut off"

    def wild(self) -> str:
        """A call that no page makes."""
        junk = self.draw.choice([
            {"data": ["x" * 3_000_000, "no mode", 1, 2, 3, 4, 5]}, {"data": None}, {"data": []},
            {"data": [[]] * 7}, {"data": ["a", "base", True, 1e308, -1e308, 10**30, 10**9]}, [],
            {"data": [{"path": "/etc/passwd"}] * 7}, {"fn_index": -1, "data": []}, "x", None,
            {"data": ["a", "base", True, "nan", None, [], {}], "session_hash": "x" * 10_000}])
        path = self.draw.choice(["/gradio_api/call/chat", "/gradio_api/call/clear",
                                 "/gradio_api/queue/join", "/gradio_api/run/chat",
                                 "/gradio_api/call/leave", "/gradio_api/upload"])
        return str(self.post(path, junk)[0])

    def stray(self) -> str:
        """A path that asks for a file of the machine."""
        path = self.draw.choice(["/gradio_api/file=/etc/passwd", "/../../etc/passwd", "/%00",
                                 "/gradio_api/file=../app.py", "/" + "a" * 20_000])
        status, said = self.request("GET", path)
        return "LEAKED" if b"root:" in said or b"import dataclasses" in said else str(status)


SHARES = {"chat": 10, "closed_tab": 3, "unfetched": 1, "aborted": 2, "oversized": 1,
          "chunked": 1, "wild": 5, "stray": 1}


def resident(pid: int) -> float:
    """MiB of a process that are in memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def start(model: Path, port: int, log) -> subprocess.Popen:
    """Start the page, every socket that it opens written down -> its process, when it serves."""
    server = subprocess.Popen(
        [sys.executable, "-c", WATCH, "--model_dir", str(model), "--port", str(port)], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=log, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"})
    for line in server.stdout:
        if "the chat is at" in line:
            return server
    raise SystemExit(f"the server ended with {server.wait()}: {Path(log.name).read_text()}")


def soak(server: subprocess.Popen, port: int, requests: int, users: int) -> dict:
    """Send the requests -> what came of them, and the curve of memory."""
    draw = random.Random(1)
    plan = draw.choices([*SHARES], [*SHARES.values()], k=requests)
    visitors = [Visitor(port, number) for number in range(users)]
    locks = [threading.Lock() for _ in visitors]
    came: collections.Counter = collections.Counter()
    curve = [(0, resident(server.pid))]

    def one(number: int, kind: str) -> None:
        with locks[number % users]:
            try:
                result = getattr(visitors[number % users], kind)()
            except OSError as error:
                result = type(error).__name__
        came[f"{kind}: {result}"] += 1
        if sum(came.values()) % max(1, requests // 10) == 0:
            curve.append((sum(came.values()), resident(server.pid)))

    with concurrent.futures.ThreadPoolExecutor(users) as pool:
        for done in [pool.submit(one, *item) for item in enumerate(plan)]:
            done.result()
    return {"came": dict(sorted(came.items())), "curve": sorted(curve)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--model_dir", type=Path, help="what memory_decoder.py built")
    parser.add_argument("--grown", type=float, default=100.0, help="MiB")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        quiet = io.StringIO()
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            model = args.model_dir or write_model(Path(folder))
        port, log_path = free_port(), Path(folder) / "stderr"
        with log_path.open("w") as log:
            server = start(model, port, log)
            began = time.monotonic()
            try:
                found = soak(server, port, args.requests, args.users)
                found["alive"] = server.poll() is None
                found["last chat"] = Visitor(port, 99).chat()
            finally:
                server.send_signal(signal.SIGTERM)
                found_code = server.wait(timeout=60)
                server.stdout.close()
        lines = log_path.read_text(errors="replace").splitlines()

    connects = {line.split()[1] for line in lines if line.startswith("CONNECT")}
    third = [mib for number, mib in found["curve"] if number >= args.requests / 3]
    found |= {
        "seconds": round(time.monotonic() - began, 1),
        "exit code": found_code,
        "grown MiB behind the first third": round(max(third) - third[0], 1),
        "sockets to elsewhere": sorted(connects - {"127.0.0.1", "localhost"}),
        "pickles": sum(line.startswith("PICKLE") for line in lines),
        "tracebacks": sum("Traceback (most" in line and "failed" not in line for line in lines),
        "log KiB": round(sum(map(len, lines)) / 1024, 1),
        "longest logged line": max(map(len, lines), default=0),
    }
    for kind, count in found.pop("came").items():
        print(f"  {kind:<32}{count:>6,}")
    curve = ", ".join(f"{number:,} {mib:,.0f}" for number, mib in found["curve"])
    print(f"  requests, resident MiB: {curve}")
    for name, value in found.items():
        if name != "curve":
            print(f"  {name:<34}{value}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    return int(not found["alive"] or found["last chat"] != "answered" or found["pickles"] > 0
               or found["tracebacks"] > 0 or bool(found["sockets to elsewhere"])
               or found["grown MiB behind the first third"] > args.grown)


if __name__ == "__main__":
    sys.exit(main())

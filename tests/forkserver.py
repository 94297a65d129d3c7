"""Processes that start in a tenth of a second: forks of one that has imported the libraries.

`Forked([script, *words])` and `Forked(["-c", code, *words])` run what `python script words` would,
as `__main__`, from its source, in a process of its own, with pipes, a working directory and an
environment, and are used as a subprocess.Popen is. Only torch, transformers and what else comes
from site-packages is there already, which is what a start costs; nothing of this repository is.
What depends on how Python itself starts (its hash seed, its flags, torch's threads, a signal while
torch is imported) wants a real process.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

from pictures import draw_on_demand

ROOT = Path(__file__).resolve().parent.parent


# ══ The test's side ══════════════════════════════════════════════════════════════════════════════
class Server:
    """The process that has imported the libraries; it ends with this one."""
    running: Server | None = None

    def __init__(self) -> None:
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        subprocess.Popen([sys.executable, __file__, str(theirs.fileno())], env=env, cwd=ROOT,
                         stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        theirs.close()
        self.socket = mine

    @classmethod
    def get(cls) -> Server:
        """The one of this process, started if it is not."""
        if cls.running is None:
            cls.running = cls()
        return cls.running


class Forked:
    """A process as subprocess.Popen has it, with pipes for stdout and stderr (in one for
    `stderr_to_stdout`)."""

    def __init__(self, args: list[str], env: dict[str, str] | None = None,
                 cwd: str | Path | None = None, stderr_to_stdout: bool = False) -> None:
        self.args, self.returncode = args, None
        self.status, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pipes, fds = [], [theirs.fileno()]
        for _ in range(1 if stderr_to_stdout else 2):
            read, write = os.pipe()
            self.pipes.append(read)
            fds.append(write)
        if stderr_to_stdout:
            fds.append(fds[-1])
        task = {"args": [str(word) for word in args], "env": {**(env or os.environ)},
                "cwd": str(cwd or Path.cwd())}
        payload, requests = json.dumps(task).encode(), Server.get().socket
        socket.send_fds(requests, [len(payload).to_bytes(4, "big")], fds)
        for start in range(0, len(payload), 2**16):
            requests.send(payload[start : start + 2**16])
        theirs.close()
        for fd in set(fds[1:]):
            os.close(fd)
        self.pid = int(self.status.recv(32))

    def poll(self) -> int | None:
        """The exit code, minus the signal's number where one ended it; None while it runs."""
        if self.returncode is None and select.select([self.status], [], [], 0)[0]:
            self.returncode = int(self.status.recv(32))
        return self.returncode

    def wait(self, timeout: float = 120) -> int:
        """Wait for the end -> exit code. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            if not select.select([self.status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.poll()
        return self.returncode

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        """Read both pipes to their ends, and wait -> stdout, stderr."""
        deadline = time.monotonic() + timeout
        said = {fd: bytearray() for fd in self.pipes}
        left = set(self.pipes)
        while left:
            ready, _, _ = select.select([*left], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise subprocess.TimeoutExpired(self.args, timeout, self.last_words(said))
            for fd in ready:
                block = os.read(fd, 2**16)
                said[fd] += block
                if not block:
                    left.remove(fd)
        for fd in self.pipes:
            os.close(fd)
        self.pipes = []
        self.wait(max(0.0, deadline - time.monotonic()))
        texts = [bytes(text).decode("utf-8", "replace") for text in said.values()]
        return texts[0], texts[1] if len(texts) == 2 else ""

    def last_words(self, said: dict[int, bytearray]) -> str:
        """What a process that hangs has printed, and where each of its threads stands; shown."""
        self.send_signal(signal.SIGUSR1)
        while select.select([self.pipes[-1]], [], [], 2)[0]:
            block = os.read(self.pipes[-1], 2**16)
            said[self.pipes[-1]] += block
            if not block:
                break
        text = b"\n".join(said.values()).decode("utf-8", "replace")
        print(text[-8000:])
        return text

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL, unless it has ended."""
        self.send_signal(signal.SIGKILL)


def forked_ranks(args: list[str], ranks: int = 2) -> list[Forked]:
    """A script as so many ranks on gloo, as torch.distributed.run would start them on one machine;
    but none is stopped where another fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks),
              "LOCAL_WORLD_SIZE": str(ranks), "GROUP_WORLD_SIZE": "1", "GROUP_RANK": "0",
              "TORCHELASTIC_RESTART_COUNT": "0"}
    return [Forked(args, os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                   stderr_to_stdout=True) for rank in range(ranks)]


# ══ The server's side ════════════════════════════════════════════════════════════════════════════
def import_libraries() -> None:
    """What the scripts import, and is not theirs."""
    import matplotlib.figure  # noqa: F401
    import torch
    import torch.distributed  # noqa: F401
    from tokenizers import Tokenizer  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel  # noqa: F401

    for name in ("numba", "scipy.stats", "tyro", "filelock", "tqdm", "faiss", "matplotlib.pyplot"):
        with contextlib.suppress(ImportError):
            __import__(name)
    torch.set_num_threads(1)
    draw_on_demand()


def serve(requests: socket.socket) -> None:
    """Fork a watcher for every request, until the test's process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a person's Ctrl-C is for the tests
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a watcher
    import_libraries()
    while True:
        head, fds, _, _ = socket.recv_fds(requests, 4, 4)
        if not head:
            return
        payload, length = b"", int.from_bytes(head, "big")
        while len(payload) < length:
            payload += requests.recv(2**16)
        if os.fork() == 0:
            requests.close()
            watch(json.loads(payload), fds)
        for fd in fds:
            os.close(fd)


def watch(task: dict, fds: list[int]) -> None:
    """Fork the process itself; say its number, and at its end how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    status, out, err = fds
    child = os.fork()
    if child == 0:
        os.close(status)
        become(task, out, err)
    os.close(out)
    os.close(err)
    told = socket.socket(fileno=status)
    with contextlib.suppress(BrokenPipeError):
        told.send(str(child).encode())
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        told.send(str(code).encode())
    os._exit(0)


def become(task: dict, out: int, err: int) -> None:
    """Run a script or code as `python` would, to the end of this process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for fd, file in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (err, 2)):
        os.dup2(fd, file)
    os.closerange(3, 64)  # what belongs to the server
    sys.stdin = open(0, closefd=False, encoding="utf-8")
    sys.stdout = open(1, "w", closefd=False, encoding="utf-8")
    sys.stderr = open(2, "w", closefd=False, encoding="utf-8", buffering=1)
    faulthandler.register(signal.SIGUSR1, sys.stderr)
    os.environ.clear()
    os.environ.update(task["env"])
    os.chdir(task["cwd"])
    code = 0
    try:
        run_main(task["args"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(Exception):
        threading._shutdown()
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def run_main(args: list[str]) -> None:
    """Run `python args`, a file or -c and code."""
    if args[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *args[2:]], os.getcwd()
        exec(compile(args[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0] = list(args), str(Path(args[0]).resolve().parent)
        runpy.run_path(args[0], run_name="__main__")


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))

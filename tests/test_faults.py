"""Trust: nothing lost, nothing let in, no traceback, whatever the commands meet.

    python -m pytest                   the short form, some tries of each kind
    python -m pytest -m faults -n 0    the whole: hundreds of kills, cuts, flips, full disks

A test counts its tries and those survived; conftest.py prints the counts. Survived means: what was
saved is still there, what is damaged is refused in one line that names the file, and a job that is
started again ends in the bits of one that nothing ever happened to.

A command runs in a fork of this process, which has imported torch once for all.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import hashlib
import io
import json
import os
import pickle
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import tqdm
from conftest import ROOT, TINY, flags, write_corpus

import datastore as ds
import dnc_gpt2
import edm_gpt2
import long_range
import memory_decoder
import memory_lm

pytest.importorskip("faiss", reason="pip install faiss-cpu")
WHOLE = pytest.mark.faults


def tries(short: int, whole: int):
    """Decorator: the short form, and the whole one, which has the marker `faults`."""
    return pytest.mark.parametrize("count", [short, pytest.param(whole, marks=WHOLE)],
                                   ids=["short", "whole"])


# ── running a command in a fork ──────────────────────────────────────────────────────────────────
class Ended(NamedTuple):
    """How a forked command ended."""

    code: int  # negative: the signal that killed it
    said: str  # stdout and stderr
    seconds: float

    @property
    def told(self) -> str:
        """The line that begins with error, "" where there is none."""
        lines = [line for line in self.said.replace("\r", "\n").splitlines()
                 if line.startswith("error: ")]
        assert len(lines) <= 1, self.said
        return lines[0] if lines else ""


def forked(command: Callable, argv: list[str], *, number: int = 0, after: float = 0.0,
           prepare: Callable[[], None] = lambda: None, limit: float = 60) -> Ended:
    """Run command(argv) in a fork; signal `number` reaches it `after` s. No traceback ever."""
    read, write = os.pipe()
    began = time.monotonic()
    waiting = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, waiting)
    child = os.fork()
    if child == 0:
        os.close(read)
        os.dup2(write, 1)
        os.dup2(write, 2)
        sys.stdout = io.TextIOWrapper(open(1, "wb", buffering=0, closefd=False), "utf-8",
                                      write_through=True)
        sys.stderr = io.TextIOWrapper(open(2, "wb", buffering=0, closefd=False), "utf-8",
                                      write_through=True)
        code = 70
        faulthandler.dump_traceback_later(limit - 5, file=2)  # where it is that does not end
        try:
            # Its own lock is one of all forks: one that is killed would keep it for ever.
            tqdm.tqdm.set_lock(threading.RLock())
            signal.pthread_sigmask(signal.SIG_UNBLOCK, waiting)
            prepare()
            code = command(argv)
        except KeyboardInterrupt:  # before the command listens
            code = 128 + signal.SIGINT
        except BaseException as error:
            print(f"Traceback of {type(error).__name__}: {error}", file=sys.stderr)
        os._exit(code)

    signal.pthread_sigmask(signal.SIG_UNBLOCK, waiting)
    os.close(write)
    said = b""
    sent = number == 0
    while True:
        elapsed = time.monotonic() - began
        if not sent and elapsed >= after:
            os.kill(child, number)
            sent = True
        if elapsed > limit:
            os.kill(child, signal.SIGKILL)
            said += b"\nTraceback: no end"
        wait = 0.05 if sent else min(0.05, max(0.0, after - elapsed))
        if select.select([read], [], [], wait)[0]:
            block = os.read(read, 2**16)
            if not block:
                break
            said += block
    os.close(read)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    text = said.decode("utf-8", "replace")
    at = max(text.find("Traceback"), text.find("Timeout (0:"))
    assert "Traceback" not in text and "a fault of this program" not in text, text[at:][:3000]
    return Ended(code, text, time.monotonic() - began)


def digests(paths: list[Path]) -> dict[str, str]:
    """sha256 of the weights in files, and of other files, by name."""
    found = {}
    for path in paths:
        if path.suffix == ".pt":
            payload = torch.load(path, weights_only=True)
            parts = payload.get("model_state_dict", payload)
            raw = repr(sorted(parts)).encode()
            for name in sorted(parts):
                if isinstance(parts[name], torch.Tensor):
                    raw += parts[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        else:
            raw = path.read_bytes()
        found[path.name] = hashlib.sha256(raw).hexdigest()
    return found


# ── the commands, tiny ───────────────────────────────────────────────────────────────────────────
class Job(NamedTuple):
    """A command line, where it writes, and which of its files say that it came out the same."""

    command: Callable
    argv: list[str]
    folder: Path
    results: str  # a glob, of the folder
    again: list[str] = []  # what else the command needs to go on

    def digests(self) -> dict[str, str]:
        return digests(sorted(self.folder.glob(self.results)))


@pytest.fixture(scope="module")
def base(data_folder, tokenizer_folder, tmp_path_factory, no_pictures) -> Path:
    """A finished tiny baseline. Its run and that of a DNC import and compile for all forks."""
    folder = tmp_path_factory.mktemp("base")
    fields = TINY | dict(dataset=data_folder, tokenizer=tokenizer_folder, arms="baseline,dnc",
                         seq_len=32, max_steps=1, batch_size=2, bptt_segments=1, eval_tokens=60,
                         final_eval_tokens=60, save_dir=folder, plot_dir=folder)
    with contextlib.redirect_stdout(io.StringIO()):
        assert dnc_gpt2.main(flags(fields)) == 0
    return next(folder.glob("GPT2_Baseline_FINAL*.pt"))


@pytest.fixture(scope="module")
def no_pictures():
    """Pictures are written as everything is, and take half of the time of a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        for module, names in ((dnc_gpt2, ("plot_curves", "plot_gains", "plot_trace")),
                              (edm_gpt2, ("plot_runs",)), (memory_decoder, ("plot",))):
            for name in names:
                patch.setattr(module, name, lambda *_: None)
        patch.setitem(long_range.PARTS, "plot", lambda *_: None)
        # Here, not in workers, which import everything anew.
        patch.setattr(long_range, "run_all", lambda function, config, jobs, what:
                      [function(config, job) for job in jobs])
        yield


def dnc_job(folder: Path, data_folder: str, tokenizer_folder: str) -> Job:
    fields = TINY | dict(dataset=data_folder, tokenizer=tokenizer_folder, max_steps=8, arms="dnc",
                         save_every_steps=2, eval_tokens=60, final_eval_tokens=60,
                         save_dir=folder, plot_dir=folder)
    return Job(dnc_gpt2.main, flags(fields), folder, "*FINAL*.pt", ["--resume", "auto"])


def decoder_job(folder: Path, base: Path, domain: Path) -> Job:
    fields = dict(base=base, window=16, domain=domain, max_keys=600, train_tokens=256,
                  tune_tokens=100, eval_tokens=100, decoder_dim=16, decoder_layers=1,
                  decoder_heads=2, knn_k=8, latency_tokens=0, arms="tokens,finetuned",
                  finetune_lrs="1e-4", index="flat", batch_windows=8, model_dir=folder,
                  plot_dir=folder)
    return Job(memory_decoder.main, flags(fields), folder, "*[.][pn][tp]*[ty]")


def long_job(folder: Path) -> Job:
    fields = dict(tasks="copy", arms="window,dnc", seeds="0", lr_grid="0.01", train_rows=8,
                  valid_rows=4, test_rows=4, steps=2, batch_tokens=256, train="64:4,32",
                  lengths="32,64", workers=1, hidden_size=16, mlp_width=16, knn_width=16,
                  mem_slots=8, mem_width=8, symbols=32,
                  data_dir=folder, save_dir=folder, plot_dir=folder)
    return Job(long_range.main, flags(fields), folder, "*.pt")


def edm_job(folder: Path, base: Path, data_folder: str) -> Job:
    fields = dict(base=base, dataset=data_folder, window=16, max_steps=2, eval_tokens=200,
                  recall_rows=2, topic_rows=2, slots=64, top_k=4, batch_size=4, eval_rows=2,
                  bptt_segments=2, new_tokens=2, arms="edm", save_dir=folder / "saved",
                  plot_dir=folder)
    return Job(edm_gpt2.main, flags(fields), folder, "saved/model.safetensors")


@pytest.fixture(scope="module")
def domain(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("domain") / "texts", 600)


@pytest.fixture(scope="module")
def jobs(base, domain, data_folder, tokenizer_folder) -> dict[str, Callable[[Path], Job]]:
    """Every command, by name, as what writes into a folder."""
    return {
        "dnc_gpt2": lambda folder: dnc_job(folder, data_folder, tokenizer_folder),
        "memory_decoder": lambda folder: decoder_job(folder, base, domain),
        "long_range": long_job,
        "edm_gpt2": lambda folder: edm_job(folder, base, data_folder),
    }


COMMANDS = ("dnc_gpt2", "memory_decoder", "long_range", "edm_gpt2")


class Done(NamedTuple):
    """A command that nothing happened to."""

    job: Job
    digests: dict[str, str]
    seconds: float


@pytest.fixture(scope="module")
def done(jobs, tmp_path_factory) -> Callable[[str], Done]:
    """done(name) -> the command, run once to its end."""
    known = {}

    def run(name: str) -> Done:
        if name not in known:
            job = jobs[name](tmp_path_factory.mktemp(name))
            ended = forked(job.command, job.argv)
            assert ended.code == 0, ended.said
            known[name] = Done(job, job.digests(), ended.seconds)
            assert known[name].digests
        return known[name]

    return run


def by_command(short: str = "dnc_gpt2"):
    """Decorator: one command in the short form, every one in the whole."""
    rows = [pytest.param(short, 2, id=f"short-{short}")]
    rows += [pytest.param(name, 0, id=f"whole-{name}", marks=WHOLE) for name in COMMANDS]
    return pytest.mark.parametrize("name, count", rows)


# ── kill -9 ──────────────────────────────────────────────────────────────────────────────────────
KILLS = {"dnc_gpt2": 24, "memory_decoder": 14, "long_range": 10, "edm_gpt2": 10}


@by_command()
def test_killed_at_any_moment_it_ends_in_the_same_bits(name, count, jobs, done, tmp_path, fault):
    count = count or KILLS[name]
    draw = random.Random(name)
    whole = done(name)
    for number in range(count):
        job = jobs[name](tmp_path / str(number))
        after = draw.uniform(0, 0.95 * whole.seconds)
        forked(job.command, job.argv, number=signal.SIGKILL, after=after)
        ended = forked(job.command, [*job.argv, *job.again])
        assert ended.code == 0, ended.said[-3000:]
        fault("kill -9 at a random instant", job.digests() == whole.digests)
        shutil.rmtree(job.folder)


def at_call(number: int, act: Callable[[], None]) -> Callable[[], None]:
    """Before the number-th of all calls that a save consists of, act."""
    calls = []

    def prepare() -> None:
        def counted(function: Callable) -> Callable:
            def call(*args: object, **kwargs: object):
                calls.append(1)
                if len(calls) == number:
                    act()
                return function(*args, **kwargs)
            return call

        os.replace, os.fsync = counted(os.replace), counted(os.fsync)
        torch.save = counted(torch.save)
        dnc_gpt2.seal = counted(dnc_gpt2.seal)

    return prepare


@by_command()
def test_killed_inside_any_save_it_ends_in_the_same_bits(name, count, jobs, done, tmp_path, fault):
    """Before and between writing, syncing, sealing and renaming, of every file in turn."""
    whole = done(name)
    for number in range(1, (count or 40) + 1):
        job = jobs[name](tmp_path / str(number))
        kill = at_call(number, lambda: os.kill(os.getpid(), signal.SIGKILL))
        ended = forked(job.command, job.argv, prepare=kill)
        if ended.code == 0:  # there were fewer saves
            break
        assert ended.code == -signal.SIGKILL
        ended = forked(job.command, [*job.argv, *job.again])
        assert ended.code == 0, ended.said[-3000:]
        fault("kill -9 inside a save", job.digests() == whole.digests)
        shutil.rmtree(job.folder)


def test_saved_folder_survives_a_kill_while_a_newer_one_is_moved_in(tmp_path):
    """Either the old or the new one is there, whole."""
    def folder_of(text: str, where: Path) -> None:
        where.mkdir(parents=True)
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (where / name).write_text(text)
        sums = [f"{dnc_gpt2.file_sha(path)}  {path.name}\n" for path in sorted(where.iterdir())]
        (where / edm_gpt2.SUMS).write_text("".join(sums))

    for number in range(1, 9):
        folder = tmp_path / str(number)
        folder_of("old", folder)
        folder_of("new", folder / edm_gpt2.NEW)
        kill = at_call(number, lambda: os.kill(os.getpid(), signal.SIGKILL))
        code = forked(lambda _, f=folder: edm_gpt2.finish_save(f) or 0, [], prepare=kill).code
        assert code == -signal.SIGKILL
        edm_gpt2.check_sums(folder)
        assert (folder / "model.safetensors").read_text() == "new"
    (folder / "model.safetensors").write_text("other")
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated or altered"):
        edm_gpt2.check_sums(folder)


# ── signals ──────────────────────────────────────────────────────────────────────────────────────
@by_command()
def test_signal_at_any_moment_is_met_at_once(name, count, jobs, done, tmp_path, fault):
    """It ends with 128 + its number and one message, or, of a run that saves first, soon."""
    draw = random.Random(name)
    whole = done(name)
    for number in range(count or 16):
        job = jobs[name](tmp_path / str(number))
        sent = (signal.SIGTERM, signal.SIGINT)[number % 2]
        after = draw.uniform(0, whole.seconds)
        ended = forked(job.command, job.argv, number=sent, after=after, limit=after + 20)
        met = ended.code in (0, 128 + sent, -sent)  # 0: it was over; -15: before it listens
        fault("SIGTERM or SIGINT", met and ended.seconds < after + 10)
        shutil.rmtree(job.folder, ignore_errors=True)


@WHOLE
@pytest.mark.parametrize("script", ["dnc_gpt2", "edm_gpt2", "long_range", "memory_decoder", "app"])
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_signal_while_torch_is_imported_is_met_without_a_traceback(script, sent, tmp_path, fault):
    """For some seconds; what comes before is Python's own start."""
    for after in (0.0, 0.3, 1.0, 3.0):
        process = subprocess.Popen([sys.executable, str(ROOT / f"{script}.py"), "--help"],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        maps = Path(f"/proc/{process.pid}/maps")
        while process.poll() is None and "libtorch" not in maps.read_text():
            time.sleep(0.02)
        time.sleep(after)
        process.send_signal(sent)
        _, err = process.communicate(timeout=60)
        fault("SIGTERM or SIGINT", "Traceback" not in err)


def test_signal_in_a_long_call_of_a_library_is_met():
    """The main thread computes, and no line of Python meets the exception."""
    def job(stop):
        torch.ones(1500, 1500, dtype=torch.float64).matrix_power(2**62 - 1)

    for sent in (signal.SIGTERM, signal.SIGINT):
        ended = forked(lambda _: dnc_gpt2.run_command(job, ["x.py"], "kept"), [], number=sent,
                       after=1.0, prepare=lambda: setattr(dnc_gpt2, "GRACE", 0.2))
        assert ended.code == 128 + sent and "stopped; kept" in ended.said


def test_signal_that_a_destructor_swallows_is_met_and_not_shown():
    class Swallows:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    def job(stop):
        thing = Swallows()
        del thing
        time.sleep(30)

    ended = forked(lambda _: dnc_gpt2.run_command(job, ["x.py"], "kept"), [],
                   prepare=lambda: setattr(dnc_gpt2, "GRACE", 0.2))
    assert ended.code == 128 + signal.SIGTERM and ended.seconds < 10
    assert ended.said.strip().splitlines()[0] == "stopped; kept; continue with:"


def test_signal_waits_for_what_is_being_saved():
    def job(stop):
        with stop.held():
            time.sleep(1.0)
            print("saved", flush=True)

    ended = forked(lambda _: dnc_gpt2.run_command(job, ["x.py"], "kept"), [], number=signal.SIGTERM,
                   after=0.3, prepare=lambda: setattr(dnc_gpt2, "GRACE", 0.2))
    assert ended.code == 128 + signal.SIGTERM and "saved" in ended.said


# ── full disks ───────────────────────────────────────────────────────────────────────────────────
def limit_files(size: int) -> Callable[[], None]:
    """No file grows beyond so many bytes: the system refuses the write, as a full disk does."""
    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        dnc_gpt2.check_folder = lambda folder, *_: Path(folder).mkdir(parents=True, exist_ok=True)
        for module in (edm_gpt2, long_range, memory_decoder):
            module.check_folder = dnc_gpt2.check_folder
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return prepare


@by_command()
def test_full_disk_is_one_line_and_loses_nothing(name, count, jobs, done, tmp_path, fault):
    draw = random.Random(name)
    whole = done(name)
    sizes = [int(10 ** draw.uniform(1, 5.5)) for _ in range(count or 16)]
    for number, size in enumerate(sizes):
        job = jobs[name](tmp_path / str(number))
        ended = forked(job.command, job.argv, prepare=limit_files(size))
        told = ended.code == 0 or (ended.code == 2 and "cannot be written" in ended.told)
        assert told, ended.said[-2000:]
        ended = forked(job.command, [*job.argv, *job.again])
        assert ended.code == 0, ended.said[-3000:]
        fault("disk full", job.digests() == whole.digests)
        shutil.rmtree(job.folder)


@by_command()
def test_disk_that_fills_at_any_write_is_one_line(name, count, jobs, tmp_path, fault):
    def fill() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for number in range(1, (count or 30) + 1):
        job = jobs[name](tmp_path / str(number))
        ended = forked(job.command, job.argv, prepare=at_call(number, fill))
        if ended.code == 0:
            break
        fault("disk full", ended.code == 2 and "cannot be written" in ended.told
              and "No space left" in ended.told)
        shutil.rmtree(job.folder)


def test_metrics_on_a_full_disk_are_one_line_with_file_and_remedy(tmp_path):
    (tmp_path / dnc_gpt2.METRICS_FILE).mkdir()
    with pytest.raises(ValueError, match=r"metrics\.jsonl: cannot be written .*; free some space"):
        dnc_gpt2.append_metrics({"step": 1}, dnc_gpt2.Config(plot_dir=str(tmp_path)))


# ── files that are not what they were ────────────────────────────────────────────────────────────
class Kind(NamedTuple):
    """A kind of file that a command reads."""

    path: Path
    read: Callable[[], object]
    is_sealed: bool = True  # it has a sha256: whatever is altered is refused


@pytest.fixture(scope="module")
def kinds(done, base, tokenizer_folder) -> Callable[[str], Kind]:
    """kinds(name) -> a file and its reader; what makes it runs when it is first asked for."""

    def in_decoder(name: str, read: Callable[[Path, dict], object]) -> Callable[[], Kind]:
        def make() -> Kind:
            folder = done("memory_decoder").job.folder
            return Kind(folder / name, lambda: read(folder, ds.read_manifest(folder)))
        return make

    def open_all(folder: Path, manifest: dict) -> object:
        return ds.open_datastore(folder, manifest)

    def targets(folder: Path, manifest: dict) -> object:
        made = manifest["targets"]
        return memory_decoder.map_targets(folder, made, made["made"], made["count"], made_width)

    def trained(name: str) -> Callable[[], Kind]:
        return in_decoder(name, lambda folder, manifest: memory_lm.load_trained(
            folder / name, manifest))

    made_width = 8

    def in_edm(name: str) -> Callable[[], Kind]:
        folder = done("edm_gpt2").job.folder / "saved"
        return Kind(folder / name, lambda: edm_gpt2.check_sums(folder))

    def in_long(name: str) -> Kind:
        job = done("long_range").job
        fields = dict(word[2:].split("=", 1) for word in job.argv)
        config = long_range.read_config(long_range.Config, job.argv, "")
        assert fields["tasks"] == "copy"
        run = long_range.first_jobs(config)[0]

        def read() -> object:
            long_range.load_data.cache_clear()
            if name == "data":
                return long_range.load_data(config, "copy", "train")
            return long_range.load_checkpoint(config, run)

        path = long_range.data_path(config, "copy", "train") if name == "data" else run.path(config)
        return Kind(path, read)

    def tokenizer(folder: Path = Path(tokenizer_folder)) -> Kind:
        return Kind(folder / "tokenizer.json", lambda: dnc_gpt2.load_tokenizer(str(folder)), False)

    def text() -> Kind:
        folder = Path(base).parent / "texts"
        if not folder.exists():
            write_corpus(folder)
        return Kind(folder / "train.txt", lambda: dnc_gpt2.folder_texts(str(folder)), False)

    table = {
        "checkpoint": lambda: Kind(base, lambda: dnc_gpt2.load_checkpoint(base)),
        "manifest": in_decoder(ds.MANIFEST, lambda folder, manifest: manifest),
        "keys": in_decoder(ds.KEYS, open_all),
        "values": in_decoder(ds.VALUES, open_all),
        "index": in_decoder(ds.INDEX, open_all),
        "scale": in_decoder(ds.SCALE, open_all),
        "targets": in_decoder("targets_weights.npy", targets),
        "distances": in_decoder("targets_near.npy", targets),
        "decoder": trained(memory_lm.DECODER_FILE),
        "fine-tuned base": trained("base_finetuned.pt"),
        "EDM weights": lambda: in_edm("model.safetensors"),
        "EDM configuration": lambda: in_edm("config.json"),
        "EDM digests": lambda: in_edm(edm_gpt2.SUMS),
        "long-range data": lambda: in_long("data"),
        "long-range run": lambda: in_long("run"),
        "tokenizer": tokenizer,
        "text": text,
    }
    return lambda name: table[name]()


NAMES = ("checkpoint", "tokenizer", "text", "manifest", "keys", "values", "index", "scale",
         "targets", "distances", "decoder", "fine-tuned base", "EDM weights", "EDM configuration",
         "EDM digests", "long-range data", "long-range run")


def by_file(short: tuple[str, ...] = ("checkpoint", "tokenizer", "text")):
    """Decorator: some kinds of files in the short form, all in the whole."""
    rows = [pytest.param(name, 8, id=f"short-{name}") for name in short]
    rows += [pytest.param(name, 100, id=f"whole-{name}", marks=WHOLE) for name in NAMES]
    return pytest.mark.parametrize("name, count", rows)


@contextlib.contextmanager
def changed(kind: Kind, content: bytes):
    """The file holds this for a while."""
    aside = kind.path.with_name(kind.path.name + ".aside")
    os.rename(kind.path, aside)
    try:
        kind.path.write_bytes(content)
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            kind.path.unlink()
        os.rename(aside, kind.path)


def outcome(kind: Kind) -> str:
    """refused | read; anything but one line about the file is an error of the test."""
    try:
        kind.read()
        return "read"
    except (ValueError, OSError) as error:
        said, code = dnc_gpt2.ending(error, "size")
        names = (kind.path.name, kind.path.parent.name, str(kind.path.parent))
        assert code == 2 and "\n" not in said and any(name in said for name in names), said
        return "refused"


@by_file()
def test_file_that_was_cut_is_refused_by_name(name, count, kinds, fault):
    kind = kinds(name)
    whole = kind.path.read_bytes()
    draw = random.Random(name)
    for _ in range(count):
        with changed(kind, whole[: draw.randrange(len(whole))]):
            result = outcome(kind)
        fault(f"cut: {name}", result == "refused" or not kind.is_sealed)
    assert outcome(kind) == "read"


def says_the_same(altered: bytes, whole: bytes) -> bool:
    """Whether both are JSON and hold the same: of a float's 17 digits the last may be another."""
    try:
        return json.loads(altered) == json.loads(whole)
    except ValueError:
        return False


@by_file()
def test_file_with_one_flipped_bit_is_refused_by_name(name, count, kinds, fault):
    kind = kinds(name)
    whole = kind.path.read_bytes()
    draw = random.Random(name)
    for _ in range(count):
        altered = bytearray(whole)
        altered[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        with changed(kind, bytes(altered)):
            result = outcome(kind)
        harmless = not kind.is_sealed or says_the_same(bytes(altered), whole)
        fault(f"flip: {name}", result == "refused" or harmless)


def test_no_single_bit_alters_what_a_sealed_json_file_says(tmp_path):
    path = tmp_path / "some.json"
    content = {"rate": 280.07603798196993, "rows": [1, 2], "name": "a"}
    dnc_gpt2.write_json(content, path)
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        altered = bytearray(whole)
        altered[bit // 8] ^= 1 << bit % 8
        path.write_bytes(altered)
        with contextlib.suppress(ValueError):
            assert dnc_gpt2.read_json(path, "build again") == content, altered


def impostors(path: Path) -> dict[str, bytes]:
    """What else may lie under a file's name."""
    class Bomb:
        def __reduce__(self):
            return (os.system, ("touch PWNED",))

    pickled = io.BytesIO()
    torch.save({"model_state_dict": Bomb()}, pickled)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", bytes(2**27))
        bomb.writestr("archive/version", b"3\n")
    arrays = io.BytesIO()
    np.savez(arrays, a=np.zeros(3))
    objects = io.BytesIO()
    np.save(objects, np.array([Bomb()], dtype=object), allow_pickle=True)
    shape = io.BytesIO()
    np.lib.format.write_array_header_1_0(shape, {"descr": "<f2", "fortran_order": False,
                                                 "shape": (2**40, 2**20)})
    plain = io.BytesIO()
    torch.save({"model_state_dict": {}, "identity": 3, "config": {"mem_slots": 10**12}}, plain)
    huge = {"__metadata__": {}, "a": {"dtype": "F32", "shape": [2**40, 2**20],
                                      "data_offsets": [0, 2**62]}}
    header = json.dumps(huge).encode()
    return {
        "nothing": b"",
        "garbage": random.Random(0).randbytes(5000),
        "a pickle": pickle.dumps(Bomb()),
        "a pickle in a zip": pickled.getvalue(),
        "a zip bomb": packed.getvalue(),
        "arrays in a zip": arrays.getvalue(),
        "objects in an array": objects.getvalue(),
        "an absurd shape": shape.getvalue(),
        "another payload": plain.getvalue(),
        "an absurd tensor": len(header).to_bytes(8, "little") + header,
        "deep JSON": b"[" * 200_000,
        "deep objects": b'{"a":' * 200_000,
        "a list": b"[1, 2]",
        "wrong types": json.dumps({name: [] for name in (*ds.NEEDED, "model")}).encode(),
        "a long number": b'{"count": ' + b"9" * 100_000 + b"}",
        "text that is no UTF-8": "ä".encode("latin-1") * 100,
    }


@by_file()
def test_impostor_of_a_file_is_refused_by_name(name, count, kinds, fault, tmp_path, monkeypatch):
    kind = kinds(name)
    monkeypatch.chdir(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for content in impostors(kind.path).values():
        with changed(kind, content):
            result = outcome(kind)
        fault(f"impostor: {name}", result == "refused" or kind.path.suffix == ".txt")
        assert not (tmp_path / "PWNED").exists()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 300_000  # KiB


@by_file()
def test_what_is_no_file_is_refused_and_never_waited_for(name, count, kinds, fault):
    kind = kinds(name)
    aside = kind.path.with_name(kind.path.name + ".aside")
    os.rename(kind.path, aside)
    try:
        for make in (os.mkdir, os.mkfifo, lambda path: os.symlink("/dev/zero", path),
                     lambda path: os.symlink("nowhere", path)):
            make(kind.path)
            signal.alarm(30)
            result = outcome(kind)
            signal.alarm(0)
            fault(f"no file: {name}", result == "refused")
            kind.path.rmdir() if kind.path.is_dir() else kind.path.unlink()
    finally:
        os.rename(aside, kind.path)


def test_file_without_a_digest_still_loads(base, tmp_path):
    """As older versions wrote it."""
    payload = torch.load(base, weights_only=True)
    torch.save(payload, tmp_path / "old.pt")
    assert dnc_gpt2.load_checkpoint(tmp_path / "old.pt")["global_step"] == payload["global_step"]
    (tmp_path / "old.json").write_text('{"a": 1}')
    assert dnc_gpt2.read_json(tmp_path / "old.json", "") == {"a": 1}


def test_checkpoint_whose_config_is_absurd_is_refused_before_anything_is_built(base, tmp_path):
    payload = torch.load(base, weights_only=True)
    payload["arm"] = dnc_gpt2.ARMS["dnc"]
    for field, value in (("mem_slots", 10**12), ("num_reads", 10**9), ("hidden_size", "x"),
                         ("mem_width", 2**62)):
        payload["config"] |= {"memory": "dnc", field: value}
        path = tmp_path / f"{field}.pt"
        dnc_gpt2.save_tensors(payload, path)
        ended = forked(dnc_gpt2.main, flags(dict(inspect=path, plot_dir=tmp_path)))
        assert ended.code == 2 and ended.told, ended.said
        payload["config"] |= {field: 8}


@pytest.mark.parametrize("fields", [
    {"mem_slots": 10**8}, {"mem_width": 10**7}, {"hidden_size": 2**32}, {"num_reads": 10**6},
    {"num_layers": 10**7}, {"hidden_size": 2**63}, {"mem_slots": 2**62}])
def test_size_that_cannot_be_had_is_refused_before_it_is_built(fields, data_folder, tmp_path,
                                                               tokenizer_folder, monkeypatch):
    monkeypatch.setattr(dnc_gpt2, "free_memory", lambda device="cpu": 2.0**30)
    argv = TINY | dict(dataset=data_folder, tokenizer=tokenizer_folder, save_dir=tmp_path,
                       plot_dir=tmp_path) | fields
    ended = forked(dnc_gpt2.main, flags(argv), limit=30)
    assert ended.code == 2 and list(fields)[0] in ended.told, ended.said


class Vocabulary(dict):
    """A tokenizer of these tokens."""

    def get_vocab(self) -> dict:
        return self


def test_tokenizer_whose_ids_lie_far_apart_is_refused():
    assert dnc_gpt2.vocabulary_size(Vocabulary(a=0, b=1, padded=900)) == 901
    with pytest.raises(ValueError, match="the largest is 20,000,000"):
        dnc_gpt2.vocabulary_size(Vocabulary(a=0, b=20_000_000))


def test_code_of_a_folder_is_never_run_whatever_the_terminal_says(tmp_path, monkeypatch):
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'PWNED')!r}, 'w')")
    classes = {"AutoConfig": "evil.A", "AutoTokenizer": ["evil.B", None],
               "AutoModelForCausalLM": "evil.C"}
    for name in ("config.json", "tokenizer_config.json"):
        (folder / name).write_text(json.dumps({"model_type": "evil", "auto_map": classes,
                                               "tokenizer_class": "B"}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    for use in (dnc_gpt2.load_tokenizer, ds.foreign_base,
                lambda name: edm_gpt2.base_of_model(name, edm_gpt2.Config()),
                lambda name: dnc_gpt2.controller_config(dnc_gpt2.Config(init_from=name), 9)):
        with pytest.raises(ValueError, match="code of its own to be run, which is never done"):
            use(str(folder))
    assert not (tmp_path / "PWNED").exists()


def test_pipe_and_device_in_a_folder_of_texts_are_left_out(tmp_path, capsys):
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"text {number}")
    os.mkfifo(tmp_path / "pipe.txt")
    os.symlink("/dev/zero", tmp_path / "zero.txt")
    assert sum(map(len, memory_decoder.folder_domain(str(tmp_path)).values())) == 30
    assert capsys.readouterr().out.count("is no regular file; left out") == 2


# ── two at once, and data that changed ───────────────────────────────────────────────────────────
@by_command()
def test_second_run_in_a_folder_is_refused(name, count, jobs, tmp_path, fault):
    names = {"long_range": ".long_range.lock"}
    job = jobs[name](tmp_path / "one")
    folder = job.folder / "saved" if name == "edm_gpt2" else job.folder
    folder.mkdir(parents=True)
    with dnc_gpt2.locked(folder, "save_dir", names.get(name, ".lock")):
        ended = forked(job.command, job.argv)
    fault("two runs, one folder", ended.code == 2 and "another run is writing" in ended.told)


@by_command()
def test_run_whose_data_changed_never_mixes_them(name, count, done, jobs, data_folder, domain,
                                                 tokenizer_folder, base, tmp_path, fault):
    """Between stop and resume: it begins anew, or is refused."""
    folder = tmp_path / "run"
    other = write_corpus(tmp_path / "other", 700)
    make = {
        "dnc_gpt2": lambda data: dnc_job(folder, data, tokenizer_folder),
        "memory_decoder": lambda data: decoder_job(folder, base, Path(data)),
        "edm_gpt2": lambda data: edm_job(folder, base, data),
        "long_range": lambda data: long_job(folder)._replace(
            argv=[*long_job(folder).argv, f"--data_seed={int(data == str(other))}"]),
    }[name]
    first = make(str(domain if name == "memory_decoder" else data_folder))
    forked(first.command, first.argv, number=signal.SIGKILL, after=0.7 * done(name).seconds)
    second = make(str(other))
    ended = forked(second.command, [*second.argv, *second.again])
    assert ended.code in (0, 2), ended.said
    if ended.code == 0:
        shutil.move(folder, tmp_path / "mixed")
        forked(second.command, second.argv)
        pure = second.digests()
        mixed = digests(sorted((tmp_path / "mixed").glob(second.results)))
        same = {key: mixed.get(key) for key in pure} == pure
        fault("data changed between stop and resume", same)
    else:
        fault("data changed between stop and resume", bool(ended.told))


# ── streams ──────────────────────────────────────────────────────────────────────────────────────
PRINTS = """
import sys
import dnc_gpt2
dnc_gpt2.print_any_character()
def job(stop):
    for _ in range(20000):
        print("a line of a table ▲")
    open(sys.argv[1], "w").write("finished")
sys.exit(dnc_gpt2.run_command(job, ["x"], "kept"))
"""


SHELLS = {
    "{} > /dev/full": "No space left",
    "{} <&- >&- 2>&-": "",
    "{} | head -1 > /dev/null": "",
    "{} >&-": "",
    "{} >&- 2>&-": "",
    "LC_ALL=C {} > /dev/null": "",
}


@tries(3, 6)
def test_run_outlives_the_reader_of_its_tables(count, tmp_path, fault):
    script = tmp_path / "prints.py"
    script.write_text(PRINTS)
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    running = []
    for number, (shell, told) in enumerate([*SHELLS.items()][:count]):
        result = tmp_path / str(number)
        line = shell.format(f"{sys.executable} {script} {result}")
        running.append((result, told, subprocess.Popen(
            ["bash", "-c", f"set -o pipefail; {line}"], env=env, stderr=subprocess.PIPE,
            text=True)))
    for result, told, process in running:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0 and "Traceback" not in err, err
        assert told in err and err.count("\n") == bool(told)
        fault("stdout closed, broken or full", result.read_text() == "finished")

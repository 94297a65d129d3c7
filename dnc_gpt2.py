#!/usr/bin/env python3
"""Does an external memory make GPT-2 better?  GPT-2 against GPT-2 + DNC, on the same tokens.

    python dnc_gpt2.py                         train both arms, compare, plot, inspect
    python dnc_gpt2.py --help                  every Config field, its default and its comment
    python dnc_gpt2.py --lr 1e-3 --seed 2      override fields (or edit Config below)
    python dnc_gpt2.py --resume auto           continue an interrupted run, bit for bit
    python dnc_gpt2.py --inspect checkpoints/GPT2_+_DNC_FINAL_step600.pt --text "Some text"

Read downward; each section, from Config to Main, uses only what stands above it.
Letters, everywhere: B batch rows, T time, S segments (windows) a step, C hidden width,
V vocabulary, N memory slots, W word width, R read heads, P sampled positions.
The DNC is Graves et al. 2016, "Hybrid computing using a neural network with dynamic external
memory", Methods. Options marked (M), (D), (S) are Csordas & Schmidhuber 2019, arXiv 1904.10278.
"""

import ast
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import sysconfig
import textwrap
import threading
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import nn

EPS = 1e-6  # the epsilon of every equation; float32 resolves 1 - 1e-6, bfloat16 does not
ARMS = {"baseline": "GPT2 Baseline", "matched": "GPT2 Matched", "dnc": "GPT2 + DNC"}

# ══ Config ═══════════════════════════════════════════════════════════════════════════════════════
@dataclasses.dataclass(frozen=True)
class Config:
    """Every constant of a run. Edit here, or override as `--name value`."""

    # model
    hidden_size: int = 768  # C, width of the controller
    num_layers: int = 6  # transformer blocks
    num_heads: int = 8  # attention heads; divides hidden_size
    dropout: float = 0.0  # of the controller; one epoch from scratch underfits, so none
    mlp_width: int = 0  # feed-forward width, 0 = 4 * hidden_size
    init_from: str = "scratch"  # or hub name or folder of a pretrained GPT-2: its sizes are used
    # memory
    memory: str = "dnc"  # dnc | none; every arm sets its own
    mem_slots: int = 64  # N, rows of the memory matrix
    mem_width: int = 128  # W, width of one row
    num_reads: int = 4  # R, read heads
    carry_memory: bool = True  # memory crosses windows; False: empty at every window
    bptt_segments: int = 1  # S, windows of a row in a step: the gradient's reach in the memory
    use_links: bool = False  # temporal links and read modes (Graves)
    mask_min: float = 1.0  # (M) lowest key mask, 1 = no masks; 0.1 where they are used
    dealloc_wipe: bool = False  # (D) de-allocation also wipes the freed content
    sharpen_links: bool = False  # (S) sharpen what is read along links; needs use_links
    # training
    epochs: int = 1  # passes over the training split
    max_steps: int = 0  # > 0 overrides epochs
    batch_size: int = 4  # windows a step; rows of the stream = batch_size / bptt_segments
    seq_len: int = 128  # tokens a window; attention never crosses windows
    lr: float = 3e-4  # peak learning rate
    memory_lr: float = 0.1  # of the memory's parameters, as a share of lr; 1.0 is measured worse
    lr_schedule: str = "cosine"  # cosine (to a tenth of the peak) | constant
    lr_warmup: float = 0.05  # share of all steps with a linearly rising rate
    weight_decay: float = 0.01  # AdamW, on matrices only
    grad_clip: float = 1.0  # global gradient norm
    lambda_routing: float = 0.1  # weight of L_routing
    lambda_entropy: float = 0.05  # weight of L_entropy
    routing: str = "benefit"  # reward the gate where memory helps (benefit) or changes (kl) it
    routing_fraction: float = 0.125  # share of positions at which routing is computed, 1 = all
    seed: int = 0  # weights, dropout and routing positions
    arms: str = "baseline,dnc"  # of baseline, matched (as many parameters as dnc), dnc; in order
    # data
    dataset: str = "auto"  # auto | hub id | folder with train.txt, valid.txt, test.txt
    tokenizer: str = "auto"  # auto (gpt2 from the hub) | hub name | folder
    preset: str = "auto"  # full (the numbers above) | small | auto = full with CUDA, else small
    eval_tokens: int = 20_000  # of the validation split, at every save_every_steps
    final_eval_tokens: int = 0  # of validation and test for the final figures, 0 = all
    eval_rows: int = 8  # parallel rows in evaluation, at least 2 for the swapped-memory control
    # logging
    log_every_steps: int = 50  # a metrics.jsonl row
    save_every_steps: int = 3000  # validation and a checkpoint
    save_dir: str = "checkpoints/"  # checkpoints
    plot_dir: str = "plots/"  # pictures and metrics.jsonl
    # hardware
    use_compile: bool = False  # torch.compile of the controller; needs num_gpus=1 or 0
    compile_mode: str = "reduce-overhead"  # mode of torch.compile
    scan: str = "auto"  # the recurrence: auto | eager (the loop) | fused (dnc_scan.py)
    num_gpus: int | str = "auto"  # auto (up to 2, nn.DataParallel) | 0 (CPU) | 1 | 2
    precision: str = "auto"  # auto = bf16 autocast on GPUs that have it | bf16 | float32
    # commands
    resume: str = ""  # auto = newest valid state of the whole job | path of a checkpoint
    inspect: str = ""  # path of a GPT2 + DNC checkpoint: print its gates on text, no training
    text: str = "Albert Einstein was born in Ulm in 1879 and died in Princeton."  # the sample

    # derived: parallel rows of the training stream; tokens of one row a step; arms in order
    rows = property(lambda self: self.batch_size // self.bptt_segments)
    step_len = property(lambda self: self.bptt_segments * self.seq_len)
    arm_list = property(lambda self: self.arms.replace(" ", "").split(","))

    def __post_init__(self) -> None:
        check_types(self)
        arms, heads, batch, gpus = self.arm_list, self.num_heads, self.batch_size, self.num_gpus
        choices = {"memory": ("dnc", "none"), "lr_schedule": ("cosine", "constant"),
                   "routing": ("kl", "benefit"), "num_gpus": ("auto", 0, 1, 2),
                   "precision": ("auto", "bf16", "float32"), "scan": ("auto", "eager", "fused"),
                   "compile_mode": (
                       "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")}
        check_values(self, (
            ("hidden_size num_layers num_heads mem_slots mem_width num_reads bptt_segments epochs "
             "batch_size seq_len lr memory_lr grad_clip routing_fraction eval_tokens "
             "log_every_steps save_every_steps", lambda x: x > 0, "above 0"),
            ("mlp_width max_steps weight_decay lambda_routing lambda_entropy seed "
             "final_eval_tokens", lambda x: x >= 0, "0 or more"),
            ("dropout mask_min lr_warmup routing_fraction", lambda x: 0 <= x <= 1, "from 0 to 1"),
            *((name, options.__contains__, "one of " + ", ".join(map(str, options)))
              for name, options in choices.items()),
            ("arms", lambda _: set(arms) <= set(ARMS) and len(set(arms)) == len(arms),
             "a comma-separated choice of " + ", ".join(ARMS) + ", each once"),
            ("arms", lambda _: "matched" not in arms or self.init_from == "scratch",
             "without matched where init_from names a model, whose sizes are given"),
            ("eval_rows", lambda x: x >= 2, "2 or more"),
            ("seed", lambda x: x < 2**32, "below 2**32"),
            ("hidden_size", lambda x: x % heads == 0, f"divisible by num_heads ({heads})"),
            ("bptt_segments", lambda x: batch % x == 0, f"a divisor of batch_size ({batch})"),
            ("sharpen_links", lambda x: self.use_links or not x,
             "False without links; set use_links True as well"),
            ("text", lambda x: x.strip() and not re.search("[\ud800-\udfff]", x), "words in UTF-8"),
            ("num_gpus", lambda x: x != 2 or batch >= 2 * self.bptt_segments,
             f"at most the rows, batch_size ({batch}) / bptt_segments; set num_gpus=1"),
            ("use_compile", lambda x: not x or gpus != 2, "False on two GPUs; set num_gpus=1")))

# "full" repeats the shipped values of Config: a field edited away from them wins over "small".
PRESETS: dict[str, dict] = {
    "full": dict(hidden_size=768, num_layers=6, num_heads=8, mem_slots=64, mem_width=128,
                 num_reads=4, max_steps=0, batch_size=4, seq_len=128, bptt_segments=1, lr=3e-4,
                 log_every_steps=50, save_every_steps=3000),
    "small": dict(hidden_size=256, num_layers=4, num_heads=4, mem_slots=32, mem_width=64,
                  num_reads=4, max_steps=600, batch_size=8, seq_len=64, bptt_segments=1, lr=1e-3,
                  log_every_steps=10, save_every_steps=300),
}

def require(holds: bool, field: str, value: object, requirement: str) -> None:
    """Raise ValueError, naming field, value and requirement, unless the condition holds."""
    if not holds:
        raise ValueError(f"{field} = {value!r}: must be {requirement}")

def field_types(cls: type) -> dict[str, tuple[type, ...]]:
    """The types that each field of a Config class takes; one of float takes an int as well."""
    return {f.name: (float, int) if f.type is float else get_args(f.type) or (f.type,)
            for f in dataclasses.fields(cls)}

def check_types(config) -> None:
    """Raise ValueError unless every field of a Config has its type; a bool is no int here."""
    for name, types in field_types(type(config)).items():
        value, wanted = getattr(config, name), " or ".join(kind.__name__ for kind in types)
        require(type(value) in types and math.isfinite(value if type(value) is float else 0),
                name, value, "a finite " + wanted)

def check_values(config, rules) -> None:
    """Raise ValueError unless the fields named in each rule (names, fits, requirement) fit it."""
    for names, fits, requirement in rules:
        for name in names.split():
            require(fits(getattr(config, name)), name, getattr(config, name), requirement)

def parse_value(name: str, text: str, types: tuple[type, ...]) -> int | float | bool | str:
    """Read one command-line value as the first of `types` that it fits. Raises ValueError."""
    for kind in types:
        with contextlib.suppress(ValueError, KeyError):
            return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    expected = " or ".join(kind.__name__ for kind in types).replace("bool", "True or False")
    raise ValueError(f"{name} = {text!r}: must be {expected}")

def parse_overrides(cls: type, argv: list[str]) -> dict[str, int | float | bool | str]:
    """Read `--name value` and `--name=value` into a dict of fields of the Config class `cls`.
    Raises ValueError for an unknown field (listing what exists), a missing or a mistyped value."""
    types, overrides, words = field_types(cls), {}, list(argv)
    while words:
        word = words.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in types:
            raise ValueError(f"{word}: no such field; there are {', '.join(types)}")
        require(bool(equals or words), name, "", f"followed by a value, as in --{name} VALUE")
        overrides[name] = parse_value(name, text if equals else words.pop(0), types[name])
    return overrides

def make_config(cls: type, overrides: dict, presets: dict[str, dict], cuda: bool):
    """Command line over edits in the file over the preset -> (config, which preset and why)."""
    preset = overrides.get("preset", cls.preset)
    require(preset in ("auto", *presets), "preset", preset, "one of auto, " + ", ".join(presets))
    chosen = preset if preset != "auto" else "full" if cuda else "small"
    values = {k: v for k, v in presets[chosen].items() if getattr(cls, k) == presets["full"][k]}
    why = {"full": "auto: a CUDA device is visible", "small": "auto: no CUDA device is visible; "
           "--preset full is the real size, about 1.7 s a step on two CPU cores"}[chosen]
    if "epochs" in overrides or cls.epochs != 1:  # or max_steps would override them
        values.pop("max_steps", None)
    return cls(**{**values, **overrides}), f"{chosen} ({why if preset == 'auto' else 'as asked'})"

def print_help(cls: type, doc: str, small: dict, heading: str = "full and (small)") -> None:
    """Print the usage, then every field with its default and its comment, read from the source."""
    print(doc.split("\n\nRead downward")[0] + f"\n\nFields with their defaults, {heading}:")
    for line in inspect.getsource(cls).split("# derived")[0].splitlines():
        if group := re.fullmatch(r"    # (\w+)", line):
            print(f"\n  {group[1]}")
        elif field := re.fullmatch(r"    (\w+): [\w| ]+ = (.+?)  # (.+)", line):
            other = str(small.get(field[1], field[2]))
            default = field[2] if other == field[2] else f"{field[2]} ({other})"
            print(f"    --{field[1]:<17} {textwrap.shorten(default, 24):<25} {field[3]}")

# ══ Data: one token stream a split ═══════════════════════════════════════════════════════════════
class Corpus(NamedTuple):
    """Three splits as 1-D int64 token streams, and the tokenizers.Tokenizer that made them."""
    name: str
    tokenizer: object
    train: torch.Tensor
    valid: torch.Tensor
    test: torch.Tensor
    fingerprint: str  # sha256 of the three streams
    vocab_size = property(lambda self: max(self.tokenizer.get_vocab().values()) + 1)

HUB_WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1")
HUB_SECONDS = 8.0  # to decide whether the hub answers; 10 s in all with what follows

@functools.lru_cache(maxsize=1)
def hub_reachable() -> bool:
    """Whether the hub answers within HUB_SECONDS; if not, its libraries use their cache alone."""
    answered = threading.Event()

    def probe() -> None:
        with contextlib.suppress(Exception):  # a proxy may answer nonsense
            url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
            urllib.request.urlopen(url, timeout=HUB_SECONDS).close()
            answered.set()

    if os.environ.get("HF_HUB_OFFLINE", "0") in ("0", ""):
        thread = threading.Thread(target=probe, daemon=True)
        thread.start()
        thread.join(HUB_SECONDS)  # bounds name resolution too, which no socket timeout covers
        if not answered.is_set():
            os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's libraries are first imported
    return answered.is_set()

@contextlib.contextmanager
def had_or_refused(field: str, name: str, folder: str):
    """Turn the dozen kinds of error of the hub's libraries into one ValueError: both ways out."""
    reachable = Path(name).is_dir() or hub_reachable()
    try:
        yield
    except Exception as error:
        why = (str(error).splitlines() or [""])[0][:120] if reachable else "the hub does not answer"
        raise ValueError(f"{field} = {name!r}: cannot be had ({why}); connect to the hub, or give "
                         f"{folder}") from None

def embedded_texts() -> dict[str, list[str]]:
    """English documentation that every CPython carries: language topics, then docstrings by module,
    split 8 : 1 : 1 by document. Read as source text, nothing is imported. A docstring seen before
    is left out: modules that share text (posixpath, ntpath) leak none from split to split."""
    from pydoc_data.topics import topics
    documents, seen = [topics[name] for name in sorted(topics)], set()
    skip = {"test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "pydoc_data"}
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    paths = sorted(stdlib.rglob("*.py"))
    for path in (p for p in paths if skip.isdisjoint(p.relative_to(stdlib).parts)):
        with contextlib.suppress(SyntaxError, ValueError, OSError):  # templates, not Python
            nodes = [n for n in ast.walk(ast.parse(path.read_bytes())) if isinstance(n, kinds)]
            documents.append("\n\n".join(filter(None, map(ast.get_docstring, nodes))))
    texts: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for i, document in enumerate(filter(None, documents)):
        new = [part for part in dict.fromkeys(document.split("\n\n")) if part.strip() not in seen]
        seen.update(map(str.strip, new))
        if new:
            texts[{8: "valid", 9: "test"}.get(i % 10, "train")].append("\n\n".join(new) + "\n\n")
    return texts

def folder_texts(folder: str) -> dict[str, list[str]]:
    """Read train.txt, valid.txt and test.txt (UTF-8). Raises ValueError naming file and remedy."""
    texts = {}
    for split in ("train", "valid", "test"):
        path = Path(folder) / f"{split}.txt"
        require(path.is_file(), "dataset", folder, "a folder with train.txt, valid.txt and "
                f"test.txt ({path.name} is missing), or a hub id")
        try:
            texts[split] = [path.read_text(encoding="utf-8")]
        except UnicodeDecodeError as error:
            raise ValueError(f"dataset = {folder!r}: {path.name} is not UTF-8 (at byte "
                             f"{error.start}); convert it, for example with iconv") from None
        require(texts[split][0].strip() != "", "dataset", folder, f"text ({path.name} has none)")
    return texts

def hub_texts(name: str) -> dict[str, list[str]]:
    """Load a text data set from the hub or its cache. Raises ValueError naming both ways out."""
    with had_or_refused("dataset", name, "a folder with train.txt, valid.txt and test.txt"):
        from datasets import load_dataset
        splits = load_dataset(*HUB_WIKITEXT) if name == HUB_WIKITEXT[0] else load_dataset(name)
        names = {"train": "train", "valid": "validation", "test": "test"}
        return {split: ["".join(splits[theirs]["text"])] for split, theirs in names.items()}

def load_tokenizer(name: str):
    """Load a tokenizers.Tokenizer by hub name or folder. Raises ValueError naming both ways out."""
    with had_or_refused("tokenizer", name, "a folder written by a tokenizer's save_pretrained"):
        from transformers import AutoTokenizer
        tokenizer = AutoTokenizer.from_pretrained(name).backend_tokenizer
        tokenizer.no_padding()  # tokenizer.json keeps what was on when it was saved
        tokenizer.no_truncation()
    # An unreachable or incomplete name can come back as a tokenizer without a vocabulary.
    require(len(tokenizer.encode("word", add_special_tokens=False).ids) > 0, "tokenizer", name,
            "one that encodes text (this one is empty); give a folder with tokenizer.json")
    return tokenizer

def train_tokenizer(texts: list[str], vocab_size: int = 4096):
    """Train a byte-level BPE (GPT-2's kind) on the training split alone -> tokenizers.Tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    return tokenizer

def tokenize(tokenizer, documents: list[str]) -> torch.Tensor:
    """Encode documents into one stream (tokens,), by line: 7 times faster than in one piece."""
    lines = [line for document in documents for line in document.splitlines(keepends=True)]
    encodings = tokenizer.encode_batch(lines, add_special_tokens=False)
    return torch.tensor([i for encoding in encodings for i in encoding.ids], dtype=torch.int64)

def load_corpus(config: Config) -> Corpus:
    """Load the texts and the tokenizer that Config names, and tokenize. Prints each downgrade."""
    name, tokenizer = config.dataset, None
    embedded = f"Python {platform.python_version()} documentation (embedded)"
    if name == "auto":
        try:
            texts, name = hub_texts(HUB_WIKITEXT[0]), f"WikiText-2 ({HUB_WIKITEXT[1]})"
        except ValueError as error:
            texts, name = embedded_texts(), embedded
            print(f"{error}. Running on {embedded} instead")
    elif Path(name).is_dir() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        texts, name = folder_texts(name), Path(name).resolve().name
    else:
        texts = hub_texts(name)

    wanted = config.init_from if config.tokenizer == "auto" else config.tokenizer
    if wanted != "scratch":
        tokenizer, kind = load_tokenizer(wanted), Path(wanted).name
    elif name != embedded:
        try:
            tokenizer, kind = load_tokenizer("gpt2"), "gpt2"
        except ValueError as error:
            print(f"tokenizer auto: {error}. Training one on the training split instead")
    if tokenizer is None:
        tokenizer, kind = train_tokenizer(texts["train"]), "own BPE"
    streams = {split: tokenize(tokenizer, documents) for split, documents in texts.items()}
    digest = hashlib.sha256(b"".join(stream.numpy().tobytes() for stream in streams.values()))
    for split, stream in streams.items():
        least = (config.batch_size if split == "train" else config.eval_rows) * config.seq_len + 1
        require(len(stream) >= least, "dataset", config.dataset, f"longer: {split} has "
                f"{len(stream):,} tokens, a batch {least:,}; give more, or a smaller batch_size")
    label = f"{name}, {kind} tokenizer of {tokenizer.get_vocab_size():,}"
    return Corpus(label, tokenizer, **streams, fingerprint=digest.hexdigest())

def training_rows(stream: torch.Tensor, rows: int, step_len: int) -> torch.Tensor:
    """Cut a stream into contiguous rows, (rows, steps * step_len + 1), the end that fills no step
    left out. Position j of a row is input, j + 1 its target: every one scored is a real token."""
    length = (len(stream) - 1) // (rows * step_len) * step_len
    return torch.stack([stream[r * length : (r + 1) * length + 1] for r in range(rows)])

def evaluation_rows(stream: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut a whole stream into rows of inputs and targets, both (rows, length). Every token but the
    first is a target exactly once; what fills up the last row has target -100, never scored."""
    padding = -(len(stream) - 1) % rows
    inputs = F.pad(stream[:-1], (0, padding)).view(rows, -1)
    return inputs, F.pad(stream[1:], (0, padding), value=-100).view(rows, -1)

# ══ Memory: the DNC, addressing as pure functions in the paper's order ═══════════════════════════
class DNCOptions(NamedTuple):
    """Switches of the recurrence; the defaults are Graves' DNC without temporal links."""
    use_links: bool = False
    mask_min: float = 1.0  # (M), 1 = no masks
    dealloc_wipe: bool = False  # (D)
    sharpen_links: bool = False  # (S)

class DNCState(NamedTuple):
    """What one step hands to the next, one row a sequence. Without links the last two are empty."""
    memory: torch.Tensor  # (B, N, W)
    usage: torch.Tensor  # (B, N) in [0, 1]
    write_weights: torch.Tensor  # (B, N) >= 0, sum <= 1
    read_weights: torch.Tensor  # (B, R, N) >= 0, sum <= 1
    link: torch.Tensor  # (B, N, N) in [0, 1], or (B, 0, 0)
    precedence: torch.Tensor  # (B, N), or (B, 0)

class DNCTrace(NamedTuple):
    """What the memory did at each token, for losses, metrics and plots."""
    write_gate: torch.Tensor  # (B, T) in (0, 1)
    write_weights: torch.Tensor  # (B, T, N)
    read_weights: torch.Tensor  # (B, T, R, N)

class Interface(NamedTuple):
    """The controller's instructions to the memory, activations applied; optional parts None."""
    write_key: torch.Tensor  # (B, T, W)
    write_strength: torch.Tensor  # (B, T) >= 1
    erase: torch.Tensor  # (B, T, W) in (0, 1)
    write_vector: torch.Tensor  # (B, T, W)
    write_gate: torch.Tensor  # (B, T) in (0, 1)
    allocation_gate: torch.Tensor  # (B, T) in (0, 1)
    read_keys: torch.Tensor  # (B, T, R, W)
    read_strengths: torch.Tensor  # (B, T, R) >= 1
    free_gates: torch.Tensor  # (B, T, R) in (0, 1)
    read_modes: torch.Tensor | None  # (B, T, R, 3), softmax over backward, content, forward
    write_mask: torch.Tensor | None  # (B, T, W) in (mask_min, 1)
    read_masks: torch.Tensor | None  # (B, T, R, W) in (mask_min, 1)
    sharpening: torch.Tensor | None  # (B, T, R, 2) >= 1, backward and forward

def interface_sizes(width: int, reads: int, options: DNCOptions) -> dict[str, int]:
    """Sizes of the parts of one interface vector, in order; 0 for what is switched off."""
    return dict(write_key=width, write_strength=1, erase=width, write_vector=width, write_gate=1,
                allocation_gate=1, read_keys=reads * width, read_strengths=reads, free_gates=reads,
                read_modes=3 * reads * options.use_links,
                masks=(reads + 1) * width * (options.mask_min < 1),
                sharpening=2 * reads * options.sharpen_links)

def split_interface(z: torch.Tensor, width: int, reads: int, options: DNCOptions) -> Interface:
    """Split interface vectors z (B, T, I) and apply the activations (Graves, "interface")."""
    sizes = interface_sizes(width, reads, options)
    part = dict(zip(sizes, z.split(list(sizes.values()), dim=-1), strict=True))
    heads = (*z.shape[:2], reads)
    modes = write_mask = read_masks = sharpening = None
    if options.use_links:
        modes = part["read_modes"].view(*heads, 3).softmax(-1)  # (B, T, R, 3)
    if options.mask_min < 1:
        masks = part["masks"].sigmoid() * (1 - options.mask_min) + options.mask_min
        masks = masks.view(*z.shape[:2], reads + 1, width)  # (B, T, R+1, W)
        write_mask, read_masks = masks[:, :, 0], masks[:, :, 1:]  # (B, T, W), (B, T, R, W)
    if options.sharpen_links:
        sharpening = 1 + F.softplus(part["sharpening"].view(*heads, 2))  # (B, T, R, 2)
    return Interface(
        part["write_key"], 1 + F.softplus(part["write_strength"].squeeze(-1)),
        part["erase"].sigmoid(), part["write_vector"], part["write_gate"].squeeze(-1).sigmoid(),
        part["allocation_gate"].squeeze(-1).sigmoid(), part["read_keys"].view(*heads, width),
        1 + F.softplus(part["read_strengths"]), part["free_gates"].sigmoid(),
        modes, write_mask, read_masks, sharpening)

def zero_state(batch: int, slots: int, width: int, reads: int, options: DNCOptions,
               dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> DNCState:
    """An empty memory: contents, usage, weightings and links are zero."""
    zeros = functools.partial(torch.zeros, dtype=dtype, device=device)
    linked = slots if options.use_links else 0
    return DNCState(zeros(batch, slots, width), zeros(batch, slots), zeros(batch, slots),
                    zeros(batch, reads, slots), zeros(batch, linked, linked), zeros(batch, linked))

def usage_update(usage, write_weights, read_weights, free_gates):
    """u = (u + w - u*w) * psi, psi = prod_r (1 - f_r * wr_r), w and wr of the step before. usage,
    write_weights (B, N), read_weights (B, R, N), free_gates (B, R) -> usage, psi (B, N)."""
    kept = 1 - free_gates.unsqueeze(-1) * read_weights  # (B, R, N)
    # A chain of products: the backward of torch.prod synchronises a GPU with the host.
    retention = functools.reduce(torch.mul, kept.unbind(1))  # (B, N)
    return (usage + write_weights - usage * write_weights) * retention, retention

def allocation_weighting(usage: torch.Tensor) -> torch.Tensor:
    """a_i = (1 - u~_i) * prod of u~_j over the slots j freer than i, with u~ = eps + (1 - eps) u:
    usage (B, N) -> (B, N), sum <= 1. Ties break to the lowest slot; the order is constant for the
    gradient. Not renormalised: a full memory allocates nothing. A comparison matrix stands in for
    Graves' sort: same order, and the product becomes a sum of logarithms (u~ >= eps)."""
    used = EPS + (1 - EPS) * usage
    mine, other = used.unsqueeze(2), used.unsqueeze(1)  # (B, N, 1), (B, 1, N)
    slot = torch.arange(usage.shape[1], device=usage.device)
    lower = slot < slot.unsqueeze(1)  # (N, N), j < i
    freer = (other < mine) | ((other == mine) & lower)  # (B, N, N), slot j comes before slot i
    before = (freer.to(used.dtype) @ used.log().unsqueeze(2)).squeeze(2)  # (B, N)
    return (1 - used) * before.exp()

def content_weighting(keys, strengths, memory, masks=None):
    """softmax over slots of strength * cos(key, slot); the eps stands INSIDE the root of each norm,
    or the gradient into an empty slot is thousands of times larger. A mask (M) multiplies both.
    keys (B, K, W), strengths (B, K), memory (B, N, W), masks (B, K, W) or None -> (B, K, N)."""
    if masks is None:
        dots = keys @ memory.transpose(1, 2)  # (B, K, N)
        slot_norms = (memory * memory).sum(-1).unsqueeze(1)  # (B, 1, N)
    else:
        keys = keys * masks
        dots = (keys * masks) @ memory.transpose(1, 2)  # (B, K, N)
        slot_norms = (masks * masks) @ (memory * memory).transpose(1, 2)  # (B, K, N)
    key_norms = (keys * keys).sum(-1, keepdim=True)  # (B, K, 1)
    cosine = dots * (slot_norms + EPS).rsqrt() * (key_norms + EPS).rsqrt()
    return (strengths.unsqueeze(-1) * cosine).softmax(-1)

def link_update(link, precedence, write_weights):
    """L_ij = (1 - w_i - w_j) L_ij + w_i p_j with zero diagonal, then p = (1 - sum w) p + w.
    link (B, N, N), precedence and write_weights (B, N). Returns link and precedence."""
    w_i, w_j = write_weights.unsqueeze(2), write_weights.unsqueeze(1)  # (B, N, 1), (B, 1, N)
    link = (1 - w_i - w_j) * link + w_i * precedence.unsqueeze(1)  # (B, N, N)
    link = link.tril(-1) + link.triu(1)
    return link, (1 - write_weights.sum(-1, keepdim=True)) * precedence + write_weights

def sharpen(weights: torch.Tensor, strengths: torch.Tensor) -> torch.Tensor:
    """(S): ((d + eps) / max(d + eps))^s over its sum. weights (B, R, N), strengths (B, R)."""
    weights = weights + EPS
    powered = (weights / weights.amax(-1, keepdim=True)).pow(strengths.unsqueeze(-1))
    return powered / powered.sum(-1, keepdim=True)

def dnc_step(x: Interface, state: DNCState, options: DNCOptions) -> tuple[torch.Tensor, DNCState]:
    """One token: usage, allocation and content, write, links, read. x holds one step's (B, ...).
    Returns the read vectors (B, R, W) and the new state."""
    usage, retention = usage_update(state.usage, state.write_weights, state.read_weights,
                                    x.free_gates)
    allocation = allocation_weighting(usage)  # (B, N)
    key, strength = x.write_key.unsqueeze(1), x.write_strength.unsqueeze(1)  # (B, 1, W), (B, 1)
    mask = None if x.write_mask is None else x.write_mask.unsqueeze(1)  # (B, 1, W)
    content = content_weighting(key, strength, state.memory, mask).squeeze(1)  # (B, N)
    gate = x.allocation_gate.unsqueeze(1)  # (B, 1)
    write_weights = x.write_gate.unsqueeze(1) * (gate * allocation + (1 - gate) * content)

    slots = write_weights.unsqueeze(2)  # (B, N, 1)
    memory = state.memory * retention.unsqueeze(2) if options.dealloc_wipe else state.memory
    memory = memory * (1 - slots * x.erase.unsqueeze(1)) + slots * x.write_vector.unsqueeze(1)

    content = content_weighting(x.read_keys, x.read_strengths, memory, x.read_masks)  # (B, R, N)
    link, precedence, read_weights = state.link, state.precedence, content
    if options.use_links:
        link, precedence = link_update(link, precedence, write_weights)
        backward = state.read_weights @ link  # L^T wr: (B, R, N)
        forward = state.read_weights @ link.transpose(1, 2)  # L wr: (B, R, N)
        if options.sharpen_links:
            backward = sharpen(backward, x.sharpening[..., 0])
            forward = sharpen(forward, x.sharpening[..., 1])
        by_mode = torch.stack((backward, content, forward), dim=-1)  # (B, R, N, 3)
        read_weights = (by_mode @ x.read_modes.unsqueeze(-1)).squeeze(-1)  # (B, R, N)
    new = DNCState(memory, usage, write_weights, read_weights, link, precedence)
    return read_weights @ memory, new  # (B, R, W)

def dnc_loop(interface: Interface, state: DNCState, options: DNCOptions):
    """The readable recurrence over T tokens; a faster one must return the same: reads (B, T, R, W),
    write_weights (B, T, N), read_weights (B, T, R, N) and the state after the last token."""
    length = interface.write_gate.shape[1]
    parts = [[None] * length if p is None else p.unbind(1) for p in interface]
    results = []
    for step in zip(*parts, strict=True):
        read, state = dnc_step(Interface(*step), state, options)
        results.append((read, state.write_weights, state.read_weights))
    return (*(torch.stack(x, dim=1) for x in zip(*results, strict=True)), state)

say_once = functools.cache(functools.partial(print, flush=True))

def pick_scan(scan: str, state: DNCState, options: DNCOptions):
    """The recurrence for such a state: dnc_loop, or dnc_scan, the same function fused, where it can
    run. Says once why it cannot; raises ValueError then if `scan` is "fused"."""
    if scan == "eager":
        return dnc_loop
    try:
        from dnc_scan import dnc_scan, refusal
        reason = refusal(state, options)
    except ImportError as error:
        reason = f"{error}; put the folder dnc_scan beside dnc_gpt2.py"
    require(scan == "auto" or not reason, "scan", scan, f"auto or eager here: {reason}")
    if reason:
        say_once(f"scan auto: the recurrence runs in the eager loop, slower: {reason}")
    return dnc_loop if reason else dnc_scan

class DNCMemory(nn.Module):
    """DNC over hidden states, a pure function of (h, state): h + read_proj(reads).
    departs from Graves: the controller never sees its reads (there those of step t-1 enter at step
    t), so the interface of all T tokens, from LN(h), is one matrix product. `read_proj` has no bias
    and starts at zero: step 0 is the baseline, zeroed reads are the model without memory.
    `biases` are added to the initial biases of parts of the interface, by their names."""

    def __init__(self, hidden_size: int, slots: int, width: int, reads: int,
                 options: DNCOptions = DNCOptions(), scan: str = "auto", biases=None):
        super().__init__()
        self.slots, self.width, self.reads, self.options = slots, width, reads, options
        self.scan = scan
        self.norm = nn.LayerNorm(hidden_size)
        sizes = interface_sizes(width, reads, options)
        self.interface = nn.Linear(hidden_size, sum(sizes.values()))
        added = [torch.full((n,), (biases or {}).get(part, 0.0)) for part, n in sizes.items()]
        self.interface.bias.data += torch.cat(added)
        self.read_proj = nn.Linear(reads * width, hidden_size, bias=False)
        nn.init.zeros_(self.read_proj.weight)

    def init_state(self, batch_size: int) -> DNCState:
        weight = self.read_proj.weight
        return zero_state(batch_size, self.slots, self.width, self.reads, self.options,
                          torch.promote_types(weight.dtype, torch.float32), weight.device)

    def forward(self, h: torch.Tensor, state: DNCState) -> tuple[torch.Tensor, DNCState, DNCTrace]:
        """h (B, T, C), state of B rows -> h_out (B, T, C), state after the last token, trace."""
        z = self.interface(self.norm(h))  # (B, T, I)
        with torch.autocast(h.device.type, enabled=False):  # 1 - 1e-6 is 1 in bfloat16
            z = z if z.dtype == torch.float64 else z.float()
            x = split_interface(z, self.width, self.reads, self.options)
            recurrence = pick_scan(self.scan, state, self.options)
            reads, write_weights, read_weights, state = recurrence(x, state, self.options)
        h_out = h + self.read_proj(reads.flatten(2))  # (B, T, R*W) -> (B, T, C)
        return h_out, state, DNCTrace(x.write_gate, write_weights, read_weights)

def build_memory(config: Config) -> DNCMemory:
    switches = config.use_links, config.mask_min, config.dealloc_wipe, config.sharpen_links
    return DNCMemory(config.hidden_size, config.mem_slots, config.mem_width, config.num_reads,
                     DNCOptions(*switches), config.scan)

def map_state(fn, state):
    """Apply fn to every tensor of a state: detach, move, roll or select rows. None stays None."""
    return None if state is None else type(state)(*map(fn, state))

# ══ Model: GPT2Model, memory, tied LM head ═══════════════════════════════════════════════════════
# Columns of the statistics that evaluation takes of every token; the last six need a memory.
STATS = ("nll", "top1", "top5", "confidence", "rank", "pred_entropy",
         "nll_without", "kl", "gate", "gate_squared", "write_rate", "sparsity")
LOGITS_AT_ONCE = 2**25  # elements of one chunk of logits (128 MiB in float32)

class Output(NamedTuple):
    """One forward pass, every tensor batch first, so that nn.DataParallel can gather it."""
    loss: torch.Tensor  # (B,) mean of nll, the same in every row; it alone has a gradient
    nll: torch.Tensor  # (B, L) next-token cross-entropy in nats; 0 where the target is -100
    top1: torch.Tensor  # (B, L) 1 where the most likely token is the target
    effect: torch.Tensor  # (B, P) KL or benefit at the sampled positions, no gradient
    stats: torch.Tensor  # (B, L, len(STATS)) when measuring, else (B, 0, 0)
    trace: DNCTrace | None
    state: DNCState | None

def weight_entropy(weights: torch.Tensor) -> torch.Tensor:
    """H(w / sum w) / log N of weightings (..., N), in [0, 1]; a closed gate is no focus."""
    p = weights / weights.sum(-1, keepdim=True).clamp_min(1e-12)
    return -(p * p.clamp_min(1e-12).log()).sum(-1) / math.log(max(2, weights.shape[-1]))

def chunks(rows: int, weight: torch.Tensor, tensors: int = 1) -> list[slice]:
    """Slices of rows of which that many tensors of logits, weight (V, C), fit LOGITS_AT_ONCE."""
    size = max(1, LOGITS_AT_ONCE // tensors // weight.shape[0])
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]

def token_statistics(h, h_out, targets, weight, trace: DNCTrace | None, brief: bool):
    """The STATS of every token (brief: the nll, the rest 0): h, h_out (B, L, C), targets (B, L),
    weight (V, C) -> (B, L, K). Logits in float32 and in chunks: ties among bfloat16 logits would
    flatter rank and accuracy. Ties count against the model in top-k, and for it in rank."""
    out = torch.zeros(targets.numel(), len(STATS), device=h.device)  # (B*L, K)
    h, h_out, at = h.flatten(0, 1).float(), h_out.flatten(0, 1).float(), targets.reshape(-1, 1)
    weight = weight.float()
    for rows in chunks(len(out), weight):
        target = at[rows].clamp_min(0)  # (M, 1)
        log_p = (h_out[rows] @ weight.T).log_softmax(-1)  # (M, V)
        found = log_p.gather(1, target)  # (M, 1)
        columns = [-found]
        if not brief:
            p, best = log_p.exp(), log_p.topk(6).values  # in the top k: above the k + 1st best
            minus_entropy = (p.unsqueeze(1) @ log_p.unsqueeze(2))[:, 0]  # (M, 1)
            larger = (log_p > found).sum(-1, keepdim=True, dtype=torch.int32)
            columns += [found > best[:, 1:2], found > best[:, 5:], found.exp(), 1 + larger,
                        -minus_entropy]
        if not brief and trace is not None:
            log_q = (h[rows] @ weight.T).log_softmax(-1)  # (M, V)
            cross = (p.unsqueeze(1) @ log_q.unsqueeze(2))[:, 0]  # (M, 1)
            gate = trace.write_gate.reshape(-1, 1)[rows]  # (M, 1)
            spread = weight_entropy(trace.write_weights.flatten(0, 1)[rows]).unsqueeze(1)  # (M, 1)
            columns += [-log_q.gather(1, target), minus_entropy - cross, gate, gate * gate,
                        gate > 0.7, 1 - spread]
        out[rows, : len(columns)] = torch.cat([column.float() for column in columns], dim=1)
    return (out * (at != -100)).view(*targets.shape, len(STATS))

class HeadLoss(torch.autograd.Function):
    """Mean next-token cross-entropy of the tied LM head, a chunk of logits at a time, which turns
    into its own gradient in place: two (M, V) tensors never exist, and the backward only scales.
    F.linear_cross_entropy (torch 2.13) does as much, but more slowly here, and gives no top-1."""

    @staticmethod
    def forward(ctx, h, weight, targets, dtype: torch.dtype):
        """h (M, C), weight (V, C), targets (M,), dtype of products -> loss (), nll, top1 (M,)."""
        low, scored = weight.to(dtype), (targets != -100).to(h.dtype)
        nll, top1 = torch.zeros_like(scored), torch.zeros_like(scored)
        d_h, d_weight = torch.zeros_like(h), torch.zeros_like(weight)
        for rows in chunks(len(h), weight, tensors=1 if dtype == h.dtype else 2):
            x, target = h[rows].to(dtype), targets[rows].clamp_min(0).unsqueeze(1)  # (m, 1)
            logits = (x @ low.T).to(h.dtype)  # (m, V)
            top, best = logits.max(-1, keepdim=True)  # (m, 1)
            found = logits.sub_(top).gather(1, target)  # (m, 1)
            total = logits.exp_().sum(-1, keepdim=True)  # (m, 1), of what softmax divides by
            nll[rows] = (total.log() - found)[:, 0] * scored[rows]
            top1[rows] = (best[:, 0] == targets[rows]).to(h.dtype)
            if any(ctx.needs_input_grad):
                grad = logits.scatter_add_(1, target, -total).to(dtype)  # (m, V), over share
                share = scored[rows].unsqueeze(1) / (total * len(h))  # (m, 1)
                d_h[rows] = (grad @ low).to(h.dtype) * share
                if dtype == weight.dtype:
                    d_weight.addmm_(grad.T, x * share)
                else:
                    d_weight += grad.T @ (x * share).to(dtype)
        ctx.grads = d_h, d_weight
        ctx.mark_non_differentiable(nll, top1)
        return nll.mean(), nll, top1

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if ctx.grads is None:
            raise RuntimeError("HeadLoss serves one backward: run the forward again")
        (d_h, d_weight), ctx.grads = ctx.grads, None  # scaled in place
        return d_h.mul_(grad_loss), d_weight.mul_(grad_loss), None, None

class GPT2WithMemory(nn.Module):
    """GPT2Model, then (with config.memory "dnc") DNCMemory, then the LM head tied to the embedding.
    Every arm is this class, built from the same seed: the controllers start equal."""

    def __init__(self, config: Config, controller: nn.Module):
        super().__init__()
        self.config, self.controller = config, controller
        torch.manual_seed(config.seed + 1)
        self.memory = build_memory(config) if config.memory == "dnc" else None
        torch.manual_seed(config.seed + 2)  # dropout: the same stream in every arm

    def init_state(self, rows: int) -> DNCState | None:
        return None if self.memory is None else self.memory.init_state(rows)

    def hidden(self, tokens: torch.Tensor, state: DNCState | None):
        """tokens (B, L) -> h without and with memory (B, L, C), state, trace. The controller sees
        L / seq_len independent windows in one call, the memory the whole length if carried."""
        if self.config.use_compile:
            torch.compiler.cudagraph_mark_step_begin()
        B, L = tokens.shape
        windows = tokens.reshape(-1, min(self.config.seq_len, L))  # (B*S, T)
        h = self.controller(input_ids=windows, use_cache=False).last_hidden_state  # (B*S, T, C)
        if self.memory is not None and not self.config.carry_memory:
            h_out, _, trace = self.memory(h, self.memory.init_state(len(windows)))
            trace = DNCTrace(*(x.reshape(B, L, *x.shape[2:]) for x in trace))
            return h.reshape(B, L, -1), h_out.reshape(B, L, -1), state, trace
        h = h.reshape(B, L, -1)
        return (h, h, None, None) if self.memory is None else (h, *self.memory(h, state))

    def forward(self, tokens, targets, state, positions=None, measure: str = "") -> Output:
        """tokens, targets (B, L) (one window or a multiple of seq_len; target -100 = not scored),
        state of B rows, positions (B, P) of the routing effect or None, measure "", brief, full."""
        B, L = tokens.shape
        # Entered here because the threads of nn.DataParallel do not inherit autocast's dtype.
        bf16 = self.config.precision == "bf16"
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=bf16):
            h, h_out, state, trace = self.hidden(tokens, state)
            weight = self.controller.get_input_embeddings().weight  # (V, C)
            effect, stats = h.new_zeros(B, 0), h.new_zeros(B, 0, 0)
            if not measure:
                loss, nll, top1 = HeadLoss.apply(h_out.flatten(0, 1), weight, targets.flatten(),
                                                 torch.bfloat16 if bf16 else h_out.dtype)
                loss, nll, top1 = loss.expand(B), nll.view(B, L), top1.view(B, L)
                if positions is not None:
                    effect = self.routing_effect(h, h_out, nll, weight, targets, positions)
        if measure:  # without autocast
            stats = token_statistics(h, h_out, targets, weight, trace, brief=measure == "brief")
            loss, nll, top1 = stats[..., 0].mean(1), stats[..., 0], stats[..., 1]
        return Output(loss, nll, top1, effect, stats, trace, state)

    @torch.no_grad()
    def routing_effect(self, h, h_out, nll, weight, targets, positions) -> torch.Tensor:
        """What memory does at positions (B, P): the benefit NLL without - NLL with, or KL(with ||
        without), both (B, P) in nats. Logits without memory exist here alone, a chunk at a time."""
        at = (torch.arange(len(h), device=h.device).unsqueeze(1), positions)  # (B, 1), (B, P)
        h, h_out, nll, targets = (x[at].flatten(0, 1) for x in (h, h_out, nll, targets))  # (B*P, …)
        effect = torch.zeros_like(nll)
        for rows in chunks(len(h), weight, tensors=4):
            without = F.linear(h[rows], weight).float()  # (m, V)
            if self.config.routing == "kl":
                log_p = F.linear(h_out[rows], weight).float().log_softmax(-1)  # (m, V)
                effect[rows] = (log_p.exp() * (log_p - without.log_softmax(-1))).sum(-1)
            else:
                effect[rows] = F.cross_entropy(without, targets[rows], reduction="none") - nll[rows]
        return effect.view(positions.shape)

def controller_config(config: Config, vocab_size: int):
    """The controller's transformers.GPT2Config, from Config or from the pretrained GPT-2 it names.
    Raises ValueError when that is no GPT-2, has no room for the window, or another vocabulary."""
    from transformers import AutoConfig, GPT2Config
    name, drop = config.init_from, dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"),
                                                 config.dropout)
    if name == "scratch":
        return GPT2Config(
            vocab_size=vocab_size, n_positions=config.seq_len, n_embd=config.hidden_size,
            n_layer=config.num_layers, n_head=config.num_heads, n_inner=config.mlp_width or None,
            bos_token_id=None, eos_token_id=None, **drop)
    with had_or_refused("init_from", name, "a folder written by a GPT-2's save_pretrained"):
        found = AutoConfig.from_pretrained(name, **drop)
    require(found.model_type == "gpt2", "init_from", name, f"a GPT-2 (this is {found.model_type})")
    require(config.seq_len <= found.n_positions, "seq_len", config.seq_len,
            f"at most the {found.n_positions} positions of {name}")
    require(vocab_size <= found.vocab_size, "tokenizer", f"{vocab_size} entries",
            f"that of {name}, with {found.vocab_size} entries; set --tokenizer")
    return found

def build_model(config: Config, settings) -> GPT2WithMemory:
    """Build an arm's model on the CPU from the run's seed, and settings, its GPT2Config."""
    from transformers import GPT2Model
    torch.manual_seed(config.seed)
    if config.init_from == "scratch":
        settings._attn_implementation = "sdpa"
        controller = GPT2Model(settings)
    else:
        with had_or_refused("init_from", config.init_from, "a folder with the weights of a GPT-2"):
            controller = GPT2Model.from_pretrained(config.init_from, config=settings,
                                                   attn_implementation="sdpa").float()
    return GPT2WithMemory(config, controller)

def count_parameters(module: nn.Module | None) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters())

# ══ Loss, metrics, evaluation ════════════════════════════════════════════════════════════════════
def total_loss(output: Output, positions: torch.Tensor | None, config: Config) -> torch.Tensor:
    """L = L_LM + lambda_r L_routing + lambda_e L_entropy, a scalar. L_routing, -mean(g sg(effect))
    over positions (B, P), rewards a gate that is open where memory changes the prediction."""
    loss = output.loss.mean()
    if positions is not None:
        gates = output.trace.write_gate.gather(1, positions)  # (B, P)
        loss = loss - config.lambda_routing * (gates * output.effect).mean()
    if output.trace is not None and config.lambda_entropy > 0:
        loss = loss + config.lambda_entropy * weight_entropy(output.trace.write_weights).mean()
    return loss

def routing_positions(config: Config, step: int, device="cpu") -> torch.Tensor | None:
    """Positions (rows, P) at which L_routing is computed, drawn from seed and step alone; None
    where there is no such loss: a step without it computes no logits without memory."""
    if config.memory == "none" or config.lambda_routing == 0:
        return None
    count = max(1, round(config.routing_fraction * config.step_len))
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    order = torch.rand(config.rows, config.step_len, generator=generator).argsort(1)
    return order[:, :count].to(device)  # (rows, P)

class StopSignal(Exception):
    """SIGINT or SIGTERM, kept until raised where the run can be saved; a second is not caught."""
    signum = 0

    def receive(self, number: int, frame: object) -> None:
        self.signum = number
        signal.signal(number, signal.SIG_DFL)

    def check(self) -> None:
        if self.signum:
            raise self

@torch.no_grad()
def evaluate(model: GPT2WithMemory, stream: torch.Tensor, config: Config, stop: StopSignal,
             brief: bool = False, swap: bool = False) -> dict:
    """Score every token of a stream but the first, memory carried along each row from an empty
    state; with `swap`, at each window start every row gets the state of the row before it. Returns
    `metrics` (means over tokens; brief: of the loss alone), and by window, so that arms can be
    compared, `sums` (windows, rows, K) of STATS and `counts` (windows, rows) of scored tokens."""
    device = next(model.parameters()).device
    state, sums, counts = model.init_state(config.eval_rows), [], []
    windows = (rows.split(config.seq_len, 1) for rows in evaluation_rows(stream, config.eval_rows))
    model.eval()
    for x, y in zip(*windows, strict=True):  # (rows, T) each
        stop.check()
        if swap:
            state = map_state(lambda tensor: tensor.roll(1, 0), state)
        output = model(x.to(device), y.to(device), state, measure="brief" if brief else "full")
        state = output.state
        sums.append(output.stats.double().sum(1).cpu())  # (rows, K)
        counts.append((y != -100).sum(1))
    model.train()
    sums, counts = torch.stack(sums), torch.stack(counts)
    mean = dict(zip(STATS, (sums.sum((0, 1)) / counts.sum()).tolist(), strict=True))
    metrics = {"loss": mean["nll"], "ppl": math.exp(min(700, mean["nll"])),
               "bpt": mean["nll"] / math.log(2)}
    names = {} if brief else {"top1_acc": "top1", "top5_acc": "top5", "confidence": "confidence",
                              "mean_rank": "rank", "pred_entropy": "pred_entropy"}
    if model.memory is not None and not brief:
        names |= {"avg_gate": "gate", "write_rate": "write_rate", "write_sparsity": "sparsity",
                  "mem_kl": "kl", "loss_without": "nll_without"}
        metrics["gate_std"] = math.sqrt(max(0.0, mean["gate_squared"] - mean["gate"] ** 2))
    metrics |= {ours: mean[theirs] for ours, theirs in names.items()}
    return {"metrics": metrics, "sums": sums, "counts": counts}

# ══ Checkpoints: one format, exact resume ════════════════════════════════════════════════════════
PAYLOAD = ("arm config corpus controller fingerprint tokenizer model_state_dict global_step epoch "
           "optimizer_state_dict stream_position val_ppl memory_state rng history meter results")
# Fields that may differ between the run that saved and the run that resumes.
FREE_FIELDS = ("dataset tokenizer preset log_every_steps save_every_steps save_dir plot_dir arms "
               "use_compile compile_mode num_gpus resume inspect text eval_tokens scan").split()

@dataclasses.dataclass
class Run:
    """One arm in training: all that a checkpoint holds. The only mutable record in this file."""
    arm: str  # its name in tables and file names
    config: Config
    model: GPT2WithMemory
    optimizer: torch.optim.Optimizer
    total_steps: int
    steps_per_epoch: int
    step: int = 0
    state: DNCState | None = None
    history: list[dict] = dataclasses.field(default_factory=list)  # rows of metrics.jsonl
    meter: dict = dataclasses.field(default_factory=lambda: dict(  # speed; means since the last row
        seconds=0.0, tokens=0, peak_mb=0.0, steps=0, loss=0.0, top1=0.0, gate=0.0))
    results: dict = dataclasses.field(default_factory=dict)  # of the finished arm
    last_saved: str = ""
    tokens_per_s = property(lambda self: self.meter["tokens"] / (self.meter["seconds"] or math.nan))

    def payload(self, corpus: Corpus) -> dict:
        """Everything an exact resume needs, as tensors and plain values."""
        ppl = [math.nan] + [row["ppl"] for row in self.history if row["split"] == "validation"]
        if self.results:  # of the whole split
            ppl.append(self.results["valid"]["metrics"]["ppl"])
        return dict(
            arm=self.arm, config=dataclasses.asdict(self.config), corpus=corpus.name,
            controller=self.model.controller.config.to_json_string(use_diff=False),
            fingerprint=corpus.fingerprint, tokenizer=corpus.tokenizer.to_str(),
            model_state_dict=self.model.state_dict(),
            optimizer_state_dict=self.optimizer.state_dict(),
            global_step=self.step, epoch=self.step // self.steps_per_epoch,
            stream_position=self.step % self.steps_per_epoch * self.config.step_len,
            val_ppl=ppl[-1], memory_state=None if self.state is None else [*self.state],
            rng=dict(torch=torch.get_rng_state(), cuda=torch.cuda.get_rng_state_all()),
            history=self.history, meter=self.meter, results=self.results)

def save_checkpoint(run: Run, corpus: Corpus, final: bool = False) -> None:
    """Write `{arm}_[FINAL_]step{N}.pt` under a temporary name, then rename it: a kill or a full
    disk never leaves half a checkpoint. Raises ValueError, saying what was kept."""
    name = f"{run.arm.replace(' ', '_')}_{'FINAL_' if final else ''}step{run.step}.pt"
    path = Path(run.config.save_dir) / name
    temporary = path.with_name(name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(run.payload(corpus), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise ValueError(f"save_dir = {run.config.save_dir!r}: cannot write {name} ({error}); the "
                         f"last good checkpoint is {run.last_saved or 'none yet'}; free some "
                         "space, then continue with --resume auto") from None
    run.last_saved = str(path)

def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint. Raises ValueError naming a file that is missing, truncated or foreign."""
    require(Path(path).is_file(), "checkpoint", str(path), "a file; see what save_dir holds")
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
        fits = not set(PAYLOAD.split()) - payload.keys()
        saved = payload["config"].keys() if fits else set()
        # A field that may differ may also be newer than the checkpoint.
        fits = fits and saved <= field_types(Config).keys() <= saved | set(FREE_FIELDS)
    except Exception:  # torch.load raises a dozen kinds on what it did not write
        raise ValueError(f"checkpoint {path}: truncated or not a checkpoint; delete it, or name "
                         "another") from None
    require(fits, "checkpoint", str(path), "of this version of dnc_gpt2.py; name another")
    return payload

def restore(run: Run, payload: dict, path: str | Path, corpus: Corpus) -> None:
    """Put a checkpoint's state into a run. Raises ValueError, naming the file and what differs,
    when it is of another arm, corpus, configuration or shape; the run is then as it was."""
    if payload["arm"] != run.arm or payload["fingerprint"] != corpus.fingerprint:
        raise ValueError(f"checkpoint {path}: of {payload['arm']} on {payload['corpus']}, this is "
                         f"{run.arm} on {corpus.name}; name another, or another save_dir")
    for name, value in dataclasses.asdict(run.config).items():
        if name not in FREE_FIELDS and (saved := payload["config"][name]) != value:
            raise ValueError(f"checkpoint {path}: was trained with {name} = {saved!r}, this run "
                             f"has {value!r}; set --{name} {saved}, or another save_dir")
    mine, theirs = ({key: tensor.shape for key, tensor in weights.items()}
                    for weights in (run.model.state_dict(), payload["model_state_dict"]))
    require(mine == theirs, "checkpoint", str(path), "of this model's shapes; name another")
    run.optimizer.load_state_dict(payload["optimizer_state_dict"])  # raises before it changes any
    run.model.load_state_dict(payload["model_state_dict"])
    run.step, run.history, run.meter, run.results = (
        payload[key] for key in ("global_step", "history", "meter", "results"))
    run.last_saved, device = str(path), next(run.model.parameters()).device
    if payload["memory_state"] is not None:
        run.state = DNCState(*(tensor.to(device) for tensor in payload["memory_state"]))
    torch.set_rng_state(payload["rng"]["torch"])
    torch.cuda.set_rng_state_all(payload["rng"]["cuda"][: torch.cuda.device_count()])

def resume_run(run: Run, corpus: Corpus) -> None:
    """Continue from the checkpoint named, if of this arm, else the newest valid one in save_dir."""
    if run.config.resume != "auto":
        payload = load_checkpoint(run.config.resume)
        require(payload["arm"] in [ARMS[name] for name in run.config.arm_list], "resume",
                run.config.resume, f"of an arm of this run ({payload['arm']} is not); set --arms")
        if payload["arm"] == run.arm:
            restore(run, payload, run.config.resume, corpus)
            print(f"{run.arm}: resumed from {run.config.resume}")
            return
    pattern = re.escape(run.arm.replace(" ", "_")) + r"_(FINAL_)?step(\d+)\.pt"
    found = [(p.stat().st_mtime_ns, int(match[2]), p) for p in Path(run.config.save_dir).iterdir()
             if (match := re.fullmatch(pattern, p.name))]
    for _, _, path in sorted(found, reverse=True):  # the newest first
        try:
            restore(run, load_checkpoint(path), path, corpus)
            print(f"{run.arm}: {'finished in' if run.results else 'resumed from'} {path}")
            return
        except ValueError as error:
            print(f"resume: passed over {error}")
    print(f"{run.arm}: no valid checkpoint in {run.config.save_dir}, starting at step 0")

# ══ Training: one loop for every arm ═════════════════════════════════════════════════════════════
class Diverged(RuntimeError):
    """Loss or gradient is not finite; the weights are still those of the step before."""

def learning_rate(step: int, total: int, config: Config) -> float:
    """Rate at `step` of `total`: a linear warm-up, then constant, or cosine to a tenth."""
    warmup = max(1, round(config.lr_warmup * total))
    if step < warmup or config.lr_schedule == "constant":
        return config.lr * min(1.0, (step + 1) / warmup)
    progress = (step - warmup) / max(1, total - warmup)
    return config.lr * (0.55 + 0.45 * math.cos(math.pi * progress))

def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW, fused; weight decay on matrices only; the memory's rate is lr * memory_lr. Reads share
    a large common part, so that at the controller's rate one Adam step of read_proj moves every
    logit at once: the noise of that bias, not the memory, would decide the comparison."""
    parts = ((model.controller, 1.0), (model.memory, config.memory_lr))
    groups = [{"params": [p for p in part.parameters() if (p.dim() >= 2) == matrix], "scale": scale,
               "weight_decay": config.weight_decay * matrix}
              for matrix in (True, False) for part, scale in parts if part is not None]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)

def peak_memory_mb(device: torch.device, reset: bool = False) -> float:
    """Peak MiB since the reset, of the device or (CPU) of the process; NaN where none can tell."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    except (OSError, TypeError):
        return math.nan

def log_row(run: Run, split: str, found: dict) -> None:
    """Append one row to the history and to metrics.jsonl."""
    run.history.append({"arm": run.arm, "step": run.step, "split": split, **found})
    with open(Path(run.config.plot_dir) / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(run.history[-1]) + "\n")

def train_step(run: Run, forward: nn.Module, rows: torch.Tensor) -> None:
    """One step on the next step_len tokens of every row. Raises Diverged, the weights untouched."""
    config, within = run.config, run.step % run.steps_per_epoch
    if within == 0:  # a new pass over the stream starts with an empty memory
        run.state = run.model.init_state(config.rows)
    tokens = rows[:, within * config.step_len : (within + 1) * config.step_len + 1]  # (B, L + 1)
    positions = routing_positions(config, run.step, rows.device)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.step, run.total_steps, config) * group["scale"]

    output = forward(tokens[:, :-1], tokens[:, 1:], run.state, positions)
    loss = total_loss(output, positions, config)
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), config.grad_clip)
    gate = loss.new_zeros(()) if output.trace is None else output.trace.write_gate.mean()
    # One transfer a step: the loss must be looked at before the weights change.
    shown = torch.stack([loss, norm, output.nll.mean(), output.top1.mean(), gate]).detach()
    loss_value, norm_value, nll, top1, gate_value = shown.tolist()
    if not math.isfinite(loss_value + norm_value):
        raise Diverged(f"{run.arm} at step {run.step}: loss {loss_value}, gradient norm "
                       f"{norm_value}; the last good checkpoint is {run.last_saved or 'none yet'}; "
                       "try a smaller --lr, a smaller --grad_clip, or --precision float32")
    run.optimizer.step()
    run.state = map_state(torch.Tensor.detach, output.state)
    run.step += 1
    for key, value in (("steps", 1), ("loss", nll), ("top1", top1), ("gate", gate_value)):
        run.meter[key] += value

def log_train(run: Run) -> str:
    """Log the means since the last logged step; returns what the bar shows."""
    loss, top1, gate = (run.meter[key] / run.meter["steps"] for key in ("loss", "top1", "gate"))
    found = {"loss": loss, "ppl": math.exp(min(700, loss)), "top1_acc": top1,
             "lr": run.optimizer.param_groups[0]["lr"]}
    log_row(run, "train", found | ({} if run.model.memory is None else {"avg_gate": gate}))
    run.meter.update(steps=0, loss=0.0, top1=0.0, gate=0.0)
    return f"loss {loss:.3f} ppl {found['ppl']:.1f} gate {gate:.2f} tok/s {run.tokens_per_s:,.0f}"

def train(run: Run, corpus: Corpus, forward: nn.Module, stop: StopSignal) -> None:
    """Train, evaluate on validation and test, and save one arm. Raises StopSignal, once saved."""
    from tqdm import tqdm
    config, device = run.config, next(run.model.parameters()).device
    rows = training_rows(corpus.train, config.rows, config.step_len).to(device)
    peak_memory_mb(device, reset=True)
    started, end = run.step, config.final_eval_tokens + 1 if config.final_eval_tokens else None
    try:
        with tqdm(total=run.total_steps, initial=run.step, desc=run.arm, unit="step") as bar:
            while True:
                at_end = run.step >= run.total_steps
                due = run.step > 0 and (at_end or run.step % config.save_every_steps == 0)
                if due and not any(row["step"] == run.step and row["split"] == "validation"
                                   for row in run.history):  # a resumed run may have done it
                    stream = corpus.valid[: config.eval_tokens + 1]
                    log_row(run, "validation", evaluate(run.model, stream, config, stop)["metrics"])
                    if not at_end:
                        save_checkpoint(run, corpus)
                if at_end:
                    break
                stop.check()
                clock = time.perf_counter()
                train_step(run, forward, rows)  # its transfer to the host has synchronised
                if run.step > started + 3:  # the first steps warm up
                    run.meter["seconds"] += time.perf_counter() - clock
                    run.meter["tokens"] += config.batch_size * config.seq_len
                bar.update()
                if run.step % config.log_every_steps == 0 or run.step == run.total_steps:
                    bar.set_postfix_str(log_train(run))
        run.meter["peak_mb"] = max(peak_memory_mb(device), run.meter["peak_mb"])
        print(f"{run.arm}: evaluating on validation and test", flush=True)
        run.results = {"valid": evaluate(run.model, corpus.valid[:end], config, stop),
                       "test": evaluate(run.model, corpus.test[:end], config, stop, brief=True)}
        run.results |= {"steps": run.step, "parameters": count_parameters(run.model),
                        "peak_mb": run.meter["peak_mb"], "tokens_per_s": run.tokens_per_s}
        save_checkpoint(run, corpus, final=True)
    except StopSignal:
        save_checkpoint(run, corpus)
        raise

def start_run(name: str, config: Config, corpus: Corpus, device: torch.device) -> Run:
    """Build one arm (a dataclasses.replace of Config) ready to train, resumed if Config says so."""
    config = dataclasses.replace(config, memory="dnc" if name == "dnc" else "none")
    if name == "matched":
        with torch.device("meta"):
            extra = count_parameters(build_memory(config)) / config.num_layers
        wider = round(extra / (2 * config.hidden_size + 1))  # two matrices and one bias
        width = (config.mlp_width or 4 * config.hidden_size) + wider
        config = dataclasses.replace(config, mlp_width=width)
    model = build_model(config, controller_config(config, corpus.vocab_size)).to(device)
    if config.use_compile:
        model.controller.compile(mode=config.compile_mode)
    per_epoch = (len(corpus.train) - 1) // (config.rows * config.step_len)
    total = config.max_steps or config.epochs * per_epoch
    run = Run(ARMS[name], config, model, make_optimizer(model, config), total, per_epoch)
    if config.resume:
        resume_run(run, corpus)
    return run

# ══ Comparison: table, memory controls, write inspection, plots ══════════════════════════════════
RULE, LINE, MARKS = "═" * 78, "  " + "─" * 74, {1: "✓", -1: "✗", 0: "≈"}
# label, metric, format, better (+1 higher, -1 lower, 0 neither), STATS column of the paired test
TABLE = (
    ("Perplexity ↓", "ppl", ",.2f", -1, "nll"),
    ("Top-1 accuracy ↑", "top1_acc", ".4f", 1, "top1"),
    ("Avg write gate", "avg_gate", ".4f", 0, None),
    ("Write sparsity ↑", "write_sparsity", ".4f", 1, None),
    ("Memory KL ↑", "mem_kl", ".4f", 1, None),
    ("Loss (nats) ↓", "loss", ".4f", -1, "nll"),
    ("Bits per token ↓", "bpt", ".4f", -1, "nll"),
    ("Top-5 accuracy ↑", "top5_acc", ".4f", 1, "top5"),
    ("Confidence ↑", "confidence", ".4f", 1, "confidence"),
    ("Mean rank ↓", "mean_rank", ",.1f", -1, "rank"),
    ("Prediction entropy", "pred_entropy", ".4f", 0, None),
    ("Gate std", "gate_std", ".4f", 0, None),
    ("Write rate", "write_rate", ".4f", 0, None),
)

def paired_sign(reference: dict, other: dict, column: str) -> int:
    """+1 / -1 where the mean of a STATS column is surely higher / lower in `other` than in
    `reference`: the 95 % interval of the paired difference excludes zero; else 0. Neighbouring
    windows are alike, so the independent units are long stretches, an eighth of a row each."""
    difference = (other["sums"] - reference["sums"])[..., STATS.index(column)]  # (windows, rows)
    counts = reference["counts"].double()
    mean = difference.sum() / counts.sum()
    stretches = (difference - mean * counts).tensor_split(min(8, len(counts)))  # ratio estimator
    residual = torch.cat([stretch.sum(0) for stretch in stretches])  # (stretches * rows,)
    error = residual.square().sum().sqrt() / counts.sum() * math.sqrt(1 + 1 / (len(residual) - 1))
    return 0 if abs(mean) <= 2 * error else 1 if mean > 0 else -1

def print_row(label: str, old: float | None, new: float | None, form: str, mark: str = "") -> None:
    """One line of a table: two values and the relative change; an em dash for what is not known."""
    cells = [format(x, form) if x is not None and math.isfinite(x) else "—" for x in (old, new)]
    ratio = math.nan if "—" in cells or not old else new / old - 1
    delta = f"{'▲' if ratio > 0 else '▼' if ratio < 0 else '='}{abs(ratio):.1%} {mark}"
    delta = "—" if math.isnan(ratio) else delta
    print(f"  {label:<21} {cells[0]:>15} {cells[1]:>15}     {delta}".rstrip())

def print_comparison(reference: Run, other: Run, corpus: Corpus) -> None:
    """Print the final table; ✓ and ✗ stand only where `other` is really better or worse."""
    old, new, config = reference.results, other.results, other.config
    tokens, scored = new["steps"] * config.batch_size * config.seq_len, new["valid"]["counts"].sum()
    print(f"\n{RULE}\n  FINAL COMPARISON — {reference.arm[5:]} GPT2 vs {other.arm}\n{RULE}\n"
          f"  {corpus.name}\n"
          f"  {tokens:,} training tokens in {new['steps']:,} steps, seed {config.seed}; scored on "
          f"{scored:,} of the {len(corpus.valid) - 1:,} of validation\n\n"
          f"  {'Metric':<21} {reference.arm:>15} {other.arm:>15}     Δ\n{LINE}")
    for label, key, form, better, column in TABLE:
        mark = MARKS[better * paired_sign(old["valid"], new["valid"], column)] if column else ""
        print_row(label, *(r["valid"]["metrics"].get(key) for r in (old, new)), form, mark)
    print_row("Test perplexity ↓", *(r["test"]["metrics"]["ppl"] for r in (old, new)), ",.2f",
              MARKS[-paired_sign(old["test"], new["test"], "nll")])
    print_row("Parameters", old["parameters"], new["parameters"], ",d")
    print_row("Training tokens/s ↑", old["tokens_per_s"], new["tokens_per_s"], ",.0f")
    print_row("Peak memory MiB ↓", old["peak_mb"], new["peak_mb"], ",.0f")
    print(f"{LINE}\n  ✓ better, ✗ worse: the paired 95 % interval over stretches of text excludes\n"
          "  zero; ≈ it does not. One seed: it covers the choice of text, not of initial weights.")

def print_controls(run: Run, baseline: Run | None, corpus: Corpus, stop: StopSignal) -> None:
    """Print validation perplexity as it is, with reads zeroed, with every row's memory swapped."""
    as_is = run.results["valid"]
    zeroed = {**as_is, "sums": as_is["sums"].clone()}
    # read_proj has no bias: zeroed reads give the logits without memory, which are measured too.
    zeroed["sums"][..., STATS.index("nll")] = as_is["sums"][..., STATS.index("nll_without")]
    stream = corpus.valid[: int(as_is["counts"].sum()) + 1]
    swapped = evaluate(run.model, stream, run.config, stop, brief=True, swap=True)
    found = {"reads zeroed": zeroed, "memory swapped": swapped}
    found |= {} if baseline is None else {baseline.arm: baseline.results["valid"]}
    print(f"\n{RULE}\n  Does the gain come from memory?   {run.arm}, validation\n{RULE}")
    print(f"  {'Perplexity ↓':<21} {'as it is':>15} {'changed':>15}     Δ\n{LINE}")
    for label, changed in found.items():
        pair = (math.exp(x["sums"][..., 0].sum() / x["counts"].sum()) for x in (as_is, changed))
        print_row(label, *pair, ",.2f", MARKS[-paired_sign(as_is, changed, "nll")])
    print("  Zeroed: h + 0 into the head. Swapped: at each window start a row gets the state of\n"
          "  the row before it; what that loses is what memory carried over from its own text.")

@torch.no_grad()
def inspect_writes(model: GPT2WithMemory, tokenizer, text: str, folder: str, corpus: str) -> None:
    """Run a text from an empty memory: print each token's write gate, draw memory_trace.png."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    require(len(ids) > 0, "text", text, "text that the tokenizer knows")
    tokens = torch.tensor([ids], device=next(model.parameters()).device)  # (1, T)
    state, traces = model.init_state(1), []
    model.eval()
    for window in tokens.split(model.config.seq_len, dim=1):
        _, _, state, trace = model.hidden(window, state)
        traces.append(trace)
    trace = DNCTrace(*(torch.cat(x, dim=1)[0].cpu() for x in zip(*traces, strict=True)))  # (T, …)
    words = [tokenizer.decode([i]).strip(" ").replace("\n", "\\n") or "␣" for i in ids]
    width = max(5, *map(len, words))
    print(f"\n{RULE}\n  Write inspection — the gate at every token of the sample\n{RULE}")
    print("  Token  Gate  bar")
    for word, gate in zip(words, trace.write_gate.tolist(), strict=True):
        print(f"  {word:<{width}}   {gate:.3f}  {'█' * round(gate * 30)}".rstrip())
    plot_trace(words, trace, Path(folder) / "memory_trace.png", corpus)

@contextlib.contextmanager
def dark_figure(path: Path, rows: int, columns: int, figsize: tuple[float, float], **grid):
    """A dark matplotlib figure and its axes, written whole or not at all when the block ends."""
    from matplotlib import figure, style
    with style.context("dark_background"):
        drawn = figure.Figure(figsize=figsize, layout="constrained")
        yield drawn, drawn.subplots(rows, columns, **grid)
        drawn.savefig(path.with_name(path.name + ".tmp"), dpi=130, format="png")
        os.replace(path.with_name(path.name + ".tmp"), path)
    print(f"wrote {path}")

def plot_trace(words: list[str], trace: DNCTrace, path: Path, corpus: str) -> None:
    """Gate above, write weights and read weights (mean of the heads) below, slots by tokens."""
    T, step = len(words), max(1, len(words) // 120)
    size = (max(8, min(40, 0.32 * T + 2)), 9)
    with dark_figure(path, 3, 1, size, sharex=True, height_ratios=[1, 2, 2]) as (figure, axes):
        axes[0].bar(range(T), trace.write_gate.numpy(), color="#ffb347", width=0.8)
        axes[0].set(ylim=(0, 1), ylabel="write gate")
        axes[0].set_title(f"GPT2 + DNC, memory by token\n{corpus}", fontsize=10)
        panels = (("write", trace.write_weights), ("read", trace.read_weights.mean(1)))  # (T, N)
        for axis, (label, weights) in zip(axes[1:], panels, strict=True):
            image = axis.imshow(weights.T.numpy(), aspect="auto", cmap="magma")
            axis.set_ylabel(f"slot ({label} weights)")
            figure.colorbar(image, ax=axis, pad=0.01)
        labels = [word.replace("$", r"\$") for word in words[::step]]
        axes[2].set_xticks(range(0, T, step), labels, rotation=90, fontsize=8)

def plot_curves(runs: list[Run], path: Path, corpus: str) -> None:
    """Loss and top-1 accuracy over steps: train thin, validation dashed with markers."""
    colors = dict(zip(ARMS.values(), ("#4fc3f7", "#aed581", "#ff8a65"), strict=True))
    styles = dict(train=dict(lw=0.9, alpha=0.8), validation=dict(lw=1.8, ls="--", marker="o", ms=5))
    with dark_figure(path, 1, 2, (13, 5)) as (figure, axes):
        panels = {"loss": "CE loss (nats/token)", "top1_acc": "top-1 accuracy"}
        for axis, (key, label) in zip(axes, panels.items(), strict=True):
            for run, split in [(run, split) for run in runs for split in styles]:
                rows = [row for row in run.history if row["split"] == split]
                axis.plot([row["step"] for row in rows], [row[key] for row in rows],
                          color=colors[run.arm], label=f"{run.arm}, {split}", **styles[split])
            axis.set(xlabel="step", ylabel=label)
            axis.grid(alpha=0.2)
            axis.legend(fontsize=9)
        figure.suptitle(f"{' vs '.join(run.arm for run in runs)}\n{corpus}", fontsize=11)

# ══ Main ═════════════════════════════════════════════════════════════════════════════════════════
def check_folder(config: Config, field: str, needed_mb: float = 1.0) -> None:
    """Make an output folder and prove that it can be written. Raises ValueError."""
    folder = Path(getattr(config, field))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".write_test").write_bytes(b"x" * 4096)
        (folder / ".write_test").unlink()
        free = shutil.disk_usage(folder).free / 2**20
    except OSError as error:
        raise ValueError(f"{field} = {str(folder)!r}: cannot be written ({error.strerror}); name "
                         "another folder") from None
    require(free >= needed_mb, field, str(folder), f"on a disk with {needed_mb:,.0f} MiB free for "
            f"one checkpoint ({free:,.0f} are); free some, or name another folder")

def choose_hardware(config: Config, visible: int) -> tuple[Config, int]:
    """Fill in precision and choose how many of the visible GPUs to use: at most 2, at most 1 a row.
    Raises ValueError when those asked for are not there, or torch.compile would meet two."""
    gpus = min(2, visible, config.rows) if config.num_gpus == "auto" else config.num_gpus
    if gpus == 1 < visible and config.num_gpus == "auto":
        print(f"num_gpus auto: 1 of {visible}; batch_size / bptt_segments = 1 row does not split")
    require(gpus <= visible, "num_gpus", gpus, f"at most {visible}, the CUDA devices that are "
            "visible; set num_gpus=auto")
    require(gpus < 2 or not config.use_compile, "use_compile", True,
            "False on two GPUs; set num_gpus=1")
    bf16 = gpus > 0 and torch.cuda.get_device_capability()[0] >= 8  # older ones emulate it
    precision = config.precision if config.precision != "auto" else "bf16" if bf16 else "float32"
    return dataclasses.replace(config, precision=precision), gpus

def print_banner(config: Config, corpus: Corpus, gpus: int, preset: str) -> None:
    """Print all that a reader needs to judge the figures: config, versions, device, data."""
    import transformers
    device = torch.cuda.get_device_name() if gpus else f"CPU, {torch.get_num_threads()} threads"
    device += " x 2, DataParallel" if gpus == 2 else ""
    print(f"{RULE}\n  DNC-GPT2: {' vs '.join(ARMS[arm] for arm in config.arm_list)}\n{RULE}\n"
          f"  preset    {preset}\n  device    {device}, {config.precision}\n"
          f"  versions  Python {platform.python_version()}, torch {torch.__version__}, "
          f"transformers {transformers.__version__}\n"
          f"  corpus    {corpus.name}, sha256 {corpus.fingerprint[:12]}\n"
          f"            train {len(corpus.train):,}, validation {len(corpus.valid):,}, test "
          f"{len(corpus.test):,} tokens")
    fields = [f"{key}={value}" for key, value in dataclasses.asdict(config).items() if value != ""]
    print(textwrap.fill(" ".join(fields[:-1]), 96, initial_indent="  config    ",
                        subsequent_indent=" " * 12, break_long_words=False))

def run_inspection(config: Config) -> None:
    """--inspect: print the gates of a trained GPT2 + DNC on a text. Raises ValueError."""
    from tokenizers import Tokenizer
    from transformers import GPT2Config
    payload = load_checkpoint(config.inspect)
    require(payload["arm"] == ARMS["dnc"], "inspect", config.inspect, f"a checkpoint of "
            f"{ARMS['dnc']} (this is of {payload['arm']}, which has no memory)")
    check_folder(config, "plot_dir")
    trained = Config(**payload["config"] | {"init_from": "scratch", "scan": config.scan})
    model = build_model(trained, GPT2Config.from_dict(json.loads(payload["controller"])))
    model.load_state_dict(payload["model_state_dict"])
    print(f"{config.inspect}: {payload['arm']}, step {payload['global_step']}, {payload['corpus']}")
    tokenizer = Tokenizer.from_str(payload["tokenizer"])
    inspect_writes(model, tokenizer, config.text, config.plot_dir, payload["corpus"])

def run_comparison(config: Config, preset: str, stop: StopSignal) -> None:
    """The main job: every arm trained and evaluated in turn, then table, controls, inspection."""
    config, gpus = choose_hardware(config, torch.cuda.device_count())
    check_folder(config, "save_dir")
    check_folder(config, "plot_dir")
    corpus = load_corpus(config)
    if config.init_from != "scratch":
        found = controller_config(config, corpus.vocab_size)
        config = dataclasses.replace(config, hidden_size=found.n_embd, num_layers=found.n_layer,
                                     num_heads=found.n_head, mlp_width=found.n_inner or 0)
    print_banner(config, corpus, gpus, preset)
    device, folder = torch.device("cuda" if gpus else "cpu"), Path(config.plot_dir)
    if "dnc" in config.arm_list:  # what cannot run is said before the first arm trains
        memory = build_memory(config).to(device)
        pick_scan(config.scan, memory.init_state(1), memory.options)
    runs = {}
    for name in config.arm_list:
        run = runs[name] = start_run(name, config, corpus, device)
        lines = "".join(json.dumps(row) + "\n" for r in runs.values() for row in r.history)
        (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
        total, memory = count_parameters(run.model), count_parameters(run.model.memory)
        print(f"\n{run.arm}: {total:,} parameters" + (f", {memory:,} of memory" if memory else ""))
        if not run.results:
            check_folder(run.config, "save_dir", 12 * total / 2**20 + 16)  # weights, two moments
            forward = nn.DataParallel(run.model, device_ids=[0, 1]) if gpus == 2 else run.model
            train(run, corpus, forward, stop)
        run.optimizer, run.model = None, run.model.cpu() if name == "dnc" else None  # frees memory
    plot_curves([*runs.values()], folder / "training_curves.png", corpus.name)
    if dnc := runs.pop("dnc", None):
        for run in runs.values():
            print_comparison(run, dnc, corpus)
        dnc.model.to(device)
        print_controls(dnc, runs.get("baseline"), corpus, stop)
        inspect_writes(dnc.model, corpus.tokenizer, config.text, config.plot_dir, corpus.name)

def main(argv: list[str]) -> int:
    """Run a command line -> exit code: 0, 1 diverged, 2 a user's mistake, 128 + signal stopped."""
    if {"-h", "--help"} & set(argv):
        print_help(Config, __doc__, PRESETS["small"])
        return 0
    stop = StopSignal()
    try:
        overrides = parse_overrides(Config, argv)
        config, preset = make_config(Config, overrides, PRESETS, torch.cuda.is_available())
        if config.inspect:
            run_inspection(config)
        else:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, stop.receive)
            run_comparison(config, preset, stop)
    except StopSignal:
        words = [f"--{key}={value}" for key, value in (overrides | {"resume": "auto"}).items()]
        print("\nstopped and saved; continue with:\n  python dnc_gpt2.py " + shlex.join(words))
        return 128 + stop.signum
    except (ValueError, OSError, Diverged) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, Diverged) else 2
    return 0

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks ▲ and █ still gets the table
    sys.exit(main(sys.argv[1:]))

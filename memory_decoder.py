#!/usr/bin/env python3
"""Plug a domain into a frozen language model: a kNN datastore, and a decoder that imitates it.

    python memory_decoder.py                   build, train, tune, evaluate; fills trained_models/
    python memory_decoder.py build|train|tune|evaluate    one part, on what the part before left
    python memory_decoder.py --base google/gemma-2b --domain ibunescu/qa_legal_dataset_train \\
        --text_template "{Title} {Question} {Answer}"
    torchrun --standalone --nproc_per_node 2 memory_decoder.py build       the datastore, in shards
    python memory_decoder.py --help            every Config field, its default and its comment

Read downward; each section uses only what stands above it.
kNN-LM is Khandelwal et al. 2020, arXiv 1911.00172; the memory decoder is Cao et al. 2025, arXiv
2508.09874. Position i of a text is a query for its token i + 1; one key is stored for each.
Letters: B rows, T tokens, D width of a key, V vocabulary, n stored keys, Q queries, k neighbours,
M entries of a sparse target, H attention heads.
"""

import contextlib
import copy
import dataclasses
import hashlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import dnc_gpt2
from dnc_gpt2 import (
    LINE,
    RULE,
    StopSignal,
    check_folder,
    check_types,
    check_values,
    count_parameters,
    dark_figure,
    embedded_texts,
    folder_texts,
    had_or_refused,
    parse_overrides,
    print_help,
    require,
    tokenize,
)

COMMANDS = ("build", "train", "tune", "evaluate")
ARMS = ("hidden", "tokens", "text", "distilled", "finetuned")
MODES = ("base", "knn", "decoder", "both")
MESSAGE_LIMIT = 20_000  # characters of one chat message

# ══ Config ═══════════════════════════════════════════════════════════════════════════════════════
@dataclasses.dataclass(frozen=True)
class Config:
    """Every constant of a run. Edit here, or override as `--name value`."""

    # what
    base: str = "auto"  # auto (newest of save_dir, else trained) | hub name | folder | .pt
    domain: str = "auto"  # auto (the embedded corpus) | hub data set | folder of .txt files
    text_template: str = ""  # one text of a hub data set's row, as "{Question} {Answer}"
    model_dir: str = "trained_models/"  # what is built and trained
    save_dir: str = "checkpoints/"  # where base auto looks for GPT2_Baseline_*, and trains one
    plot_dir: str = "plots/"  # memory_decoder.png
    seed: int = 0  # weights and order of the decoders' training
    # reading
    window: int = 1024  # tokens that the base sees at once, at most as many as it has positions
    stride: int = 0  # tokens between windows, 0 = window / 2: each is read with that much before it
    batch_windows: int = 4  # windows of one forward pass
    # datastore
    key: str = "feed_forward"  # feed_forward (its input in the last block, after the norm) | final
    max_keys: int = 0  # first so many positions of the domain, 0 = all
    index: str = "auto"  # auto (by size) | flat | ivfpq | hnsw
    nprobe: int = 32  # lists of ivfpq that a search visits
    rerank: int = 2  # candidates of ivfpq a neighbour; the distances of all are then exact
    knn_k: int = 128  # most neighbours; tuned among it, its 4th and its 16th part
    # decoder
    decoder_kind: str = "hidden"  # of memory_decoder.pt: hidden (states of the base) | tokens
    decoder_dim: int = 256  # width
    decoder_layers: int = 6  # transformer blocks
    decoder_heads: int = 32  # attention heads; divides decoder_dim
    decoder_reach: int = 256  # tokens that it attends to, and of a training row
    decoder_lr: float = 4e-3  # peak rate of AdamW
    num_epochs: int = 1  # passes over the training positions
    train_tokens: int = 200_000  # training positions of decoders and fine-tuning, 0 = all keys
    batch_tokens: int = 1024  # of a training step; small: docs/lab-notes.md, 12
    beta: float = 0.5  # of the loss: beta KL(p_knn || p_dec) + (1 - beta) CE
    target_width: int = 64  # M, heaviest tokens of a kNN target that are kept
    arms: str = "hidden,tokens,text,distilled,finetuned"  # trained beside decoder_kind
    finetune_lrs: str = "1e-4,3e-4"  # of the fine-tuned base; the better on validation is kept
    # mixing
    mixing: str = "probability"  # of base and decoder: probability | logits
    alpha: float | str = "auto"  # share of the decoder: auto (tuned) | 0 to 1
    temperature: float = 0.8  # of sampling, 0 = greedy
    top_k: int = 50  # tokens that sampling chooses from, 0 = all
    # evaluation
    tune_tokens: int = 20_000  # the first of validation, 0 = all
    eval_tokens: int = 0  # of test, 0 = all
    latency_tokens: int = 48  # generated in one timed turn, 0 = no timing
    latency_rounds: int = 5  # turns of each system; the median counts

    # derived
    arm_list = property(lambda self: list(dict.fromkeys(
        [self.decoder_kind, *filter(None, self.arms.replace(" ", "").split(","))])))
    folder = property(lambda self: Path(self.model_dir))
    rates = property(lambda self: [float(x) for x in self.finetune_lrs.split(",")])

    def __post_init__(self) -> None:
        check_types(self)
        heads = self.decoder_heads
        choices = {"key": ("feed_forward", "final"), "decoder_kind": ("hidden", "tokens"),
                   "index": ("auto", "flat", "ivfpq", "hnsw"), "mixing": ("probability", "logits")}
        check_values(self, (
            ("window batch_windows nprobe rerank knn_k decoder_dim decoder_layers decoder_heads "
             "decoder_reach decoder_lr num_epochs batch_tokens target_width latency_rounds",
             lambda x: x > 0, "above 0"),
            ("stride max_keys train_tokens temperature top_k tune_tokens eval_tokens "
             "latency_tokens", lambda x: x >= 0, "0 or more"),
            ("window", lambda x: x >= 8, "8 or more"),
            ("stride", lambda x: x <= self.window, f"at most window ({self.window})"),
            ("seed", lambda x: 0 <= x < 2**32, "from 0 to 2**32 - 1"),
            ("beta", lambda x: 0 <= x <= 1, "from 0 to 1"),
            ("alpha", lambda x: x == "auto" if isinstance(x, str) else 0 <= x <= 1,
             "auto, or from 0 to 1"),
            ("arms", lambda _: set(self.arm_list) <= set(ARMS), "of " + ", ".join(ARMS)),
            ("finetune_lrs", is_rates, "rates above 0, separated by commas"),
            ("base domain model_dir", str.strip, "named"),
            ("decoder_dim", lambda x: x % heads == 0, f"divisible by decoder_heads ({heads})"),
            *((name, options.__contains__, "one of " + ", ".join(options))
              for name, options in choices.items())))

def is_rates(text: str) -> bool:
    try:
        return all(0 < float(x) < math.inf for x in text.split(","))
    except ValueError:
        return False

def sha(*parts: object) -> str:
    """sha256 of bytes and of the text of everything else."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else repr(part).encode())
    return digest.hexdigest()

def write_json(path: Path, content: dict) -> None:
    """Write whole or not at all."""
    path.with_name(path.name + ".tmp").write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(path.with_name(path.name + ".tmp"), path)

def read_json(path: Path) -> dict:
    """A JSON object; {} where there is no such file. Raises ValueError for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        found = None
    require(isinstance(found, dict), "file", str(path), "JSON of this script; delete it and build "
            "again")
    return found

# ══ Base: any causal language model, and the keys of its forward pass ════════════════════════════
class KeyTap:
    """The keys of the forward pass that this same thread ran last: a hook takes the input of a
    module on the way. Thread-local, so that users who share the model never see each other's."""

    def __init__(self, model: nn.Module, key: str):
        self.here = threading.local()
        module = model.get_output_embeddings() if key == "final" else last_feed_forward(model)
        self.hook = module.register_forward_pre_hook(self.take, with_kwargs=True)

    def __deepcopy__(self, memo: dict):
        return self  # a copy of the model, to be fine-tuned, may share it

    def take(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.here.keys = args[0] if args else next(iter(kwargs.values()))

def last_feed_forward(model: nn.Module) -> nn.Module:
    """The feed-forward of the last block; what enters it has passed its norm. Raises ValueError."""
    layers = model.config.get_text_config().num_hidden_layers
    for blocks in model.modules():
        if isinstance(blocks, nn.ModuleList) and len(blocks) == layers:
            for name in ("mlp", "feed_forward", "ffn", "fc1"):
                if isinstance(getattr(blocks[-1], name, None), nn.Module):
                    return getattr(blocks[-1], name)
    raise ValueError(f"key = 'feed_forward': the last block of a {model.config.model_type} has no "
                     "feed-forward that is found; set --key final")

@dataclasses.dataclass(frozen=True, eq=False)
class Base:
    """A frozen causal language model. Read-only: every thread may run it."""
    name: str  # as --base takes it
    model: nn.Module
    tokenizer: object  # transformers.PreTrainedTokenizerFast
    window: int  # tokens at once, without the prefix
    prefix: tuple[int, ...]  # what its tokenizer puts before every text (Gemma: <bos>)
    own: bool  # trained by dnc_gpt2.py, whose texts are tokenized by line
    tap: KeyTap
    fingerprint: str  # of weights and vocabulary
    device = property(lambda self: next(self.model.parameters()).device)
    vocab = property(lambda self: self.model.get_output_embeddings().weight.shape[0])
    width = property(lambda self: self.model.get_output_embeddings().weight.shape[1])

    @torch.no_grad()
    def forward(self, ids: torch.Tensor, cache=None):
        """ids (B, T) -> float32 logits (B, T, V) and keys (B, T, D). `cache`, a transformers
        DynamicCache, holds what was read before and is extended."""
        out = self.model(input_ids=ids.to(self.device), past_key_values=cache,
                         use_cache=cache is not None)
        return out.logits.float(), self.tap.here.keys.float()

    def encode(self, text: str) -> list[int]:
        # Not the tokenizer's own call, which sets padding on the shared object in every thread.
        return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=True)

    def end_ids(self) -> set[int]:
        """Tokens that end an answer; none for a tokenizer that we trained."""
        settings = getattr(self.model, "generation_config", None)
        found = getattr(settings, "eos_token_id", None)
        found = found if isinstance(found, list) else [found]
        return {i for i in (*found, self.tokenizer.eos_token_id) if i is not None}

def fingerprint(model: nn.Module, tokenizer) -> str:
    """Of every weight's name and shape and up to 4,096 of its numbers, and of the vocabulary."""
    digest = hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode())
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().flatten()
        sample = flat[:: max(1, len(flat) // 4096)].float().cpu().numpy().tobytes()
        digest.update(f"{name} {tuple(weight.shape)}".encode() + sample)
    return digest.hexdigest()

def own_base(path: str):
    """A checkpoint of dnc_gpt2.py as (GPT2LMHeadModel, tokenizer). Raises ValueError."""
    from tokenizers import Tokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
    payload = dnc_gpt2.load_checkpoint(path)
    weights = payload["model_state_dict"]
    require(not any(name.startswith("memory.") for name in weights), "base", path,
            f"a checkpoint without a memory (this is {payload['arm']}); GPT2_Baseline_* is one")
    model = GPT2LMHeadModel(GPT2Config.from_dict(json.loads(payload["controller"])))
    weights = {"transformer." + name.removeprefix("controller."): x for name, x in weights.items()}
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    model.load_state_dict(weights)
    return model, PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(payload["tokenizer"]))

def foreign_base(name: str):
    """A causal LM by hub name or folder as (model, tokenizer). Raises ValueError; says how to log
    in where access has to be asked for. Weights are taken as safetensors alone, never a pickle."""
    try:
        with had_or_refused("base", name, "a folder written by save_pretrained"):
            from transformers import AutoModelForCausalLM, AutoTokenizer
            tokenizer = AutoTokenizer.from_pretrained(name)
            model = AutoModelForCausalLM.from_pretrained(name, use_safetensors=True)
    except ValueError as refused:
        if re.search(r"gated|\b40[13]\b", str(refused.__context__), re.IGNORECASE):
            raise ValueError(f"base = {name!r}: is gated; ask for access on its page, log in with "
                             "`huggingface-cli login`, then run this again") from None
        raise
    require(hasattr(tokenizer, "backend_tokenizer") and len(tokenizer.backend_tokenizer.encode(
        "word", add_special_tokens=False).ids) > 0, "base", name,
        "with a fast tokenizer that encodes text (tokenizer.json)")
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    return model, tokenizer

def newest_own(config: Config) -> str:
    """The newest GPT2_Baseline_* of save_dir; where there is none, the small one is trained."""
    pattern = "GPT2_Baseline_*step*.pt"
    paths = sorted(Path(config.save_dir).glob(pattern), key=lambda p: p.stat().st_mtime_ns)
    if not paths:
        require(rank_and_size()[1] == 1, "base", "auto", "a trained one under torchrun; train it "
                f"first, into {config.save_dir}")
        print(f"base auto: no {pattern} in {config.save_dir}; training the small one first, on "
              "what dnc_gpt2.py --dataset auto finds", flush=True)
        overrides = dict(arms="baseline", preset="small", batch_size=4, seq_len=128,
                         save_dir=config.save_dir, plot_dir=str(config.folder / "base"))
        small, preset = dnc_gpt2.make_config(dnc_gpt2.Config, overrides, dnc_gpt2.PRESETS, False)
        dnc_gpt2.run_comparison(small, preset, StopSignal())
        paths = sorted(Path(config.save_dir).glob(pattern), key=lambda p: p.stat().st_mtime_ns)
    return str(paths[-1])

def load_base(config: Config, name: str) -> Base:
    """The base that --base names. Raises ValueError with one line that says what to do."""
    own = name.endswith(".pt") or Path(name).is_file()
    model, tokenizer = own_base(name) if own else foreign_base(name)
    model = model.eval().requires_grad_(False)
    model = model.cuda() if torch.cuda.is_available() else model.float()
    settings = model.config.get_text_config()
    positions = getattr(settings, "max_position_embeddings", None) or config.window
    ids = tokenizer.backend_tokenizer.encode("word").ids
    bos = tokenizer.bos_token_id
    prefix = (bos,) if bos is not None and ids[:1] == [bos] else ()
    window = min(config.window, positions) - len(prefix)
    if min(config.window, positions) < config.window:
        print(f"window: {positions}, the positions of {Path(name).name} (asked: {config.window})")
    return Base(name, model, tokenizer, window, prefix, own, KeyTap(model, config.key),
                fingerprint(model, tokenizer))

# ══ Domain: three splits of one token stream each ════════════════════════════════════════════════
def split_texts(texts: list[str], field: str, value: str) -> dict[str, list[str]]:
    """90 : 5 : 5 by text, each text once. Where there are few, their paragraphs are the texts."""
    texts = [text for text in dict.fromkeys(texts) if text.strip()]
    if len(texts) < 20:
        print(f"{field}: {len(texts)} texts are few; their paragraphs are split 90 : 5 : 5 instead")
        parts = [part + "\n\n" for text in texts for part in re.split(r"\n\s*\n", text)]
        texts = [part for part in dict.fromkeys(parts) if part.strip()]
    require(len(texts) >= 20, field, value, "20 texts or paragraphs, to be split 90 : 5 : 5 "
            f"({len(texts)} found)")
    kinds = {18: "valid", 19: "test"}
    found: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for i, text in enumerate(texts):
        found[kinds.get(i % 20, "train")].append(text)
    return found

def hub_domain(config: Config) -> dict[str, list[str]]:
    """A hub data set through text_template; its own splits where it has all three."""
    with had_or_refused("domain", config.domain, "a folder of text files"):
        from datasets import load_dataset
        splits = load_dataset(config.domain)
    template, columns = config.text_template or "{text}", next(iter(splits.values())).column_names

    def texts(split) -> list[str]:
        try:
            return [template.format(**{k: "" if v is None else v for k, v in row.items()}) + "\n"
                    for row in split]
        except (KeyError, IndexError, ValueError, AttributeError):
            raise ValueError(f"text_template = {template!r}: must name columns of "
                             f"{config.domain}: {', '.join(columns)}, as in {{{columns[0]}}}"
                             ) from None

    names = {"train": "train", "valid": "validation", "test": "test"}
    if set(names.values()) <= splits.keys():
        return {ours: texts(splits[theirs]) for ours, theirs in names.items()}
    return split_texts([text for split in splits.values() for text in texts(split)], "domain",
                       config.domain)

def folder_domain(folder: str) -> dict[str, list[str]]:
    """train.txt, valid.txt and test.txt, or else any .txt files, split. Raises ValueError."""
    require(Path(folder).is_dir(), "domain", folder, "a folder of .txt files, a hub data set, or "
            "auto")
    if all((Path(folder) / f"{split}.txt").is_file() for split in ("train", "valid", "test")):
        return folder_texts(folder)
    texts = []
    for path in sorted(Path(folder).rglob("*.txt")):
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"domain = {folder!r}: {path.name} is not UTF-8 (at byte "
                             f"{error.start}); convert it, for example with iconv") from None
    require(any(text.strip() for text in texts), "domain", folder, "a folder with text in .txt "
            "files (there is none)")
    return split_texts(texts, "domain", folder)

class Domain(NamedTuple):
    """Three token streams (int64, 1-D) and what they are."""
    name: str
    train: torch.Tensor
    valid: torch.Tensor
    test: torch.Tensor
    fingerprint: str  # sha256 of the training tokens

def load_domain(config: Config, base: Base) -> Domain:
    """Read and tokenize the domain. Raises ValueError where it cannot be had or is too short."""
    name = config.domain
    if name == "auto":
        texts, name = embedded_texts(), f"Python {platform.python_version()} documentation"
    elif Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        texts, name = folder_domain(name), Path(name).resolve().name
    else:
        texts = hub_domain(config)
    end = base.tokenizer.eos_token_id
    streams = {}
    for split, documents in texts.items():
        if base.own:  # as it was trained
            stream = tokenize(base.tokenizer.backend_tokenizer, documents)
        else:
            encoded = base.tokenizer.backend_tokenizer.encode_batch(
                documents, add_special_tokens=False)
            ends = [] if end is None else [end]
            stream = torch.tensor([i for one in encoded for i in (*one.ids, *ends)])
        streams[split] = stream[: config.max_keys + 1 if split == "train" and config.max_keys
                                else None].long()
        require(len(stream) > 8, "domain", config.domain, f"longer: {split} has {len(stream)} "
                "tokens")
    return Domain(name, **streams, fingerprint=sha(streams["train"].numpy().tobytes()))

# ══ Reading a stream in windows: the same for the datastore and for every system ═════════════════
class Window(NamedTuple):
    """Positions start .. end - 1 are read; from `first` on they are used, each exactly once."""
    start: int
    first: int
    end: int

def plan_windows(positions: int, window: int, stride: int, batch: int) -> list[list[Window]]:
    """Cover positions 0 .. n - 1 by windows, so that each is read with at least window - stride
    tokens before it (the first window: with what there is), in groups of at most `batch`. All are
    equally long, without padding. Groups do not depend on where a build begins: resumed, or in
    shards, it computes the same."""
    found = [Window(0, 0, min(window, positions))]
    while found[-1].end < positions:
        end = min(found[-1].end + stride, positions)
        found.append(Window(end - window, found[-1].end, end))
    return [found[i : i + batch] for i in range(0, len(found), batch)]

def config_stride(config: Config, base: Base) -> int:
    return min(config.stride or max(1, base.window // 2), base.window)

def used(x: torch.Tensor, group: list[Window]) -> torch.Tensor:
    """Rows (B, T, …) of a group -> the positions that it is read for, in order (m, …)."""
    return torch.cat([x[i, w.first - w.start : w.end - w.start] for i, w in enumerate(group)])

def read_group(base: Base, stream: torch.Tensor, group: list[Window]):
    """One forward pass -> ids (B, T), logits (B, T, V), keys (B, T, D), the prefix left out."""
    ids = torch.stack([stream[w.start : w.end] for w in group])  # (B, T)
    prefix = torch.tensor(base.prefix, dtype=torch.int64).expand(len(ids), -1)  # (B, P)
    logits, keys = base.forward(torch.cat([prefix, ids], dim=1))
    return ids, logits[:, prefix.shape[1] :], keys[:, prefix.shape[1] :]

# ══ Datastore: keys and values, built in blocks, in shards, resumed where it was killed ══════════
KEYS, VALUES, INDEX = "datastore_keys.npy", "datastore_values.npy", "faiss_index.bin"
MANIFEST = "manifest.json"

@contextlib.contextmanager
def folder_lock(folder: Path):
    """One writer a folder. The system itself lets go of a lock whose process has died, so that a
    stale file is simply taken over. Raises ValueError naming the process that works there."""
    try:
        import fcntl
    except ImportError:
        print("this system has no file locks: do not run two builds in one folder")
        yield
        return
    path = folder / ".lock"
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise ValueError(f"model_dir = {str(folder)!r}: process {file.read().strip() or '?'} "
                             "is writing there; wait for it, or name another --model_dir") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield

def rank_and_size() -> tuple[int, int]:
    """This process among those that torchrun started; (0, 1) alone."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

def barrier() -> None:
    """Wait for every rank; one alone waits for nobody."""
    rank, size = rank_and_size()
    if size > 1:
        import torch.distributed as dist
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=timedelta(days=7))
        dist.barrier()

def build_identity(config: Config, base: Base, domain: Domain) -> dict:
    """All that decides the bytes of a datastore, as the manifest holds it."""
    return {"base": base.name, "base_fingerprint": base.fingerprint, "key": config.key,
            "layer": base.model.config.get_text_config().num_hidden_layers - 1,
            "window": base.window, "stride": config_stride(config, base),
            "batch_windows": config.batch_windows, "domain": domain.name,
            "text_sha256": domain.fingerprint, "count": len(domain.train) - 1,
            "width": base.width, "vocab": base.vocab, "key_dtype": "float16",
            "value_dtype": "int32",
            "tokenizer_sha256": sha(sorted(base.tokenizer.get_vocab().items()))}

def identity_hash(identity: dict) -> str:
    """A base is known by its weights: where its file lies does not matter."""
    return sha(sorted((k, v) for k, v in identity.items() if k not in ("base", "domain")))

def open_part(path: Path, shape: tuple[int, ...], dtype: str, resume: bool = False) -> np.memmap:
    """A file under construction, as it is or anew. Raises ValueError where it would not fit: a full
    disk under a memory-mapped file kills the process without a word."""
    need = 0 if resume else math.prod(shape) * np.dtype(dtype).itemsize / 2**20
    free = shutil.disk_usage(path.parent).free / 2**20
    require(free > need, "model_dir", str(path.parent), f"on a disk with {need:,.0f} MiB free for "
            f"{path.name} ({free:,.0f} are)")
    return np.lib.format.open_memmap(path, "r+" if resume else "w+", dtype, None if resume else
                                     shape)

def shard_path(config: Config, name: str, rank: int) -> Path:
    """Where a rank writes its part of a file; one rank alone writes what will be the file."""
    _, size = rank_and_size()
    return config.folder / f"{name}.{'part' if size == 1 else f'{rank}of{size}'}"

def build_shard(config: Config, base: Base, domain: Domain, identity: str) -> None:
    """Write the keys and values of this rank's positions, group after group, from where a killed
    build stopped. What the progress file counts has been flushed to disk before."""
    from tqdm import tqdm
    rank, size = rank_and_size()
    groups = plan_windows(len(domain.train) - 1, base.window, config_stride(config, base),
                          config.batch_windows)
    require(len(groups) >= size, "domain", config.domain, f"longer for {size} processes")
    mine = groups[rank * len(groups) // size : (rank + 1) * len(groups) // size]
    begin, end = mine[0][0].first, mine[-1][-1].end
    names = [shard_path(config, name, rank) for name in (KEYS, VALUES)]
    progress = config.folder / f"build.{rank}of{size}.json"
    state = read_json(progress)
    resume = state.get("identity") == identity and all(path.is_file() for path in names)
    done = state["groups"] if resume else 0
    if resume:
        print(f"build: resumed at position {mine[done][0].first if done < len(mine) else end:,}")
    else:
        progress.unlink(missing_ok=True)
    keys = open_part(names[0], (end - begin, base.width), "float16", resume)
    values = open_part(names[1], (end - begin,), "int32", resume)
    with tqdm(total=end - begin, desc="keys", unit="key", disable=rank > 0,
              initial=(mine[done][0].first if done < len(mine) else end) - begin) as bar:
        for i in range(done, len(mine)):
            group = mine[i]
            _, _, found = read_group(base, domain.train, group)
            rows = slice(group[0].first - begin, group[-1].end - begin)
            block = used(found, group).half().cpu().numpy()  # (m, D)
            require(np.isfinite(block).all(), "key", config.key, "finite in float16, and is not at "
                    f"position {group[0].first}; set --key final")
            keys[rows] = block
            values[rows] = domain.train[group[0].first + 1 : group[-1].end + 1].numpy()
            keys.flush()
            values.flush()
            write_json(progress, {"identity": identity, "groups": i + 1})
            bar.update(rows.stop - rows.start)

def merge_shards(config: Config, count: int, width: int) -> None:
    """Copy the shards of all ranks into one pair of files, still under temporary names."""
    _, size = rank_and_size()
    for name, shape, dtype in ((KEYS, (count, width), "float16"), (VALUES, (count,), "int32")):
        if size == 1:  # written in place
            continue
        whole, at = open_part(config.folder / f"{name}.part", shape, dtype), 0
        for rank in range(size):
            shard = np.load(shard_path(config, name, rank), mmap_mode="r", allow_pickle=False)
            for start in range(0, len(shard), 2**16):
                block = shard[start : start + 2**16]
                whole[at : at + len(block)] = block
                at += len(block)
        whole.flush()

# ══ Index: candidates from FAISS, exact distances from the memory-mapped keys ════════════════════
FLAT_UP_TO = 20_000  # keys: a query that reads them all is soon slower than the model itself

def import_faiss():
    """faiss on as many threads as torch has. Imported here: only the datastore needs it."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads slow torch's tenfold
    try:
        import faiss
    except ImportError:
        raise ValueError("index: needs faiss; pip install faiss-cpu") from None
    faiss.omp_set_num_threads(torch.get_num_threads())  # of this thread alone
    return faiss

def choose_index(config: Config, count: int) -> str:
    """The kind of index for so many keys; the choice is printed."""
    kind = config.index
    if kind == "auto":
        kind = "flat" if count <= FLAT_UP_TO else "ivfpq"
        print(f"index auto: {kind} for {count:,} keys (flat up to {FLAT_UP_TO:,}, then ivfpq; "
              "hnsw, which neither merges nor leaves memory, when asked for)")
    require(kind != "ivfpq" or count >= 1000, "index", kind, f"flat or hnsw for {count} keys, too "
            "few to train ivfpq on")
    return kind

def new_index(kind: str, width: int, count: int, sample: np.ndarray):
    """An empty FAISS index over squared L2 distance; ivfpq trained on a sample of keys."""
    faiss = import_faiss()
    if kind == "flat":
        return faiss.IndexFlatL2(width)
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(width, 32)
        index.hnsw.efConstruction = 80
        return index
    # 4-bit codes that a CPU scans from registers, of the keys themselves: codes of residuals need a
    # table for every list, which takes ten times as long as the scan. Re-ranking makes up for it.
    lists = max(1, min(int(4 * math.sqrt(count)), len(sample) // 39))
    most = min(256, max(128, width // 2))
    parts = max(m for m in range(1, most + 1) if width % m == 0)
    index = faiss.IndexIVFPQFastScan(faiss.IndexFlatL2(width), width, lists, parts, 4)
    index.by_residual = False
    index.cp.seed = index.pq.cp.seed = 1234
    index.train(sample)
    return index

def sample_keys(keys: np.ndarray, most: int = 100_000) -> np.ndarray:
    """Evenly spaced keys in float32, to train an index on."""
    return np.asarray(keys[:: max(1, -(-len(keys) // most))], dtype=np.float32)

def add_keys(index, keys: np.ndarray, begin: int, end: int) -> None:
    for start in range(begin, end, 2**14):
        index.add(np.asarray(keys[start : min(start + 2**14, end)], dtype=np.float32))

def build_index(config: Config, count: int) -> str:
    """Index the merged keys under a temporary name. Every rank adds its range to a copy of one
    trained index, and FAISS merges the copies; HNSW cannot be merged: the first rank adds all."""
    faiss = import_faiss()
    rank, size = rank_and_size()
    kind = choose_index(config, count) if rank == 0 else "ivfpq"
    keys = np.load(config.folder / f"{KEYS}.part", mmap_mode="r", allow_pickle=False)
    trained = config.folder / f"{INDEX}.empty"
    if rank == 0:
        index = new_index(kind, keys.shape[1], count, sample_keys(keys))
        faiss.write_index(index, str(trained))
    barrier()
    index = faiss.read_index(str(trained))
    if isinstance(index, faiss.IndexHNSW):
        add_keys(index, keys, 0, count if rank == 0 else 0)
    else:
        add_keys(index, keys, rank * count // size, (rank + 1) * count // size)
    if rank:
        faiss.write_index(index, str(shard_path(config, INDEX, rank)))
    barrier()
    if rank == 0:
        for other in range(1, size) if kind != "hnsw" else ():
            index.merge_from(faiss.read_index(str(shard_path(config, INDEX, other))), index.ntotal
                             if kind == "ivfpq" else 0)
        faiss.write_index(index, str(config.folder / f"{INDEX}.part"))
        trained.unlink()
    return kind

class Datastore(NamedTuple):
    """Keys and values on disk, an index over them in memory (flat) or mapped. Read-only."""
    keys: np.ndarray  # (n, D) float16, memory-mapped
    values: np.ndarray  # (n,) int32, memory-mapped: the token that followed
    index: object
    kind: str
    rerank: int = 2

    def search(self, queries: np.ndarray, k: int, exclude: np.ndarray | None = None):
        """The k nearest keys of queries (Q, D) by squared L2 in float32 of the float16 keys, sorted
        here (an index promises no order), ties to the lowest id -> distances (Q, k), ids (Q, k);
        inf and -1 where fewer were found. `exclude` (Q,): each query's own id, left out."""
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        wanted = k * (self.rerank if self.kind == "ivfpq" else 1) + 8 + (exclude is not None)
        wanted = min(wanted, len(self.keys))
        distances = np.full((len(queries), k), np.inf, dtype=np.float32)
        ids = np.full((len(queries), k), -1, dtype=np.int64)
        at_once = max(1, 2**19 // (wanted * queries.shape[1]))  # what a processor's cache holds
        for start in range(0, len(queries), 1024):
            found = self.candidates(queries[start : start + 1024], wanted)  # (q, c)
            for part in range(start, start + len(found), at_once):
                rows = slice(part, min(part + at_once, start + len(found)))
                near = self.exact(queries[rows], found[rows.start - start : rows.stop - start],
                                  None if exclude is None else exclude[rows], k)
                columns = near[0].shape[1]
                distances[rows, :columns], ids[rows, :columns] = near
        ids[np.isinf(distances)] = -1
        return distances, ids

    def candidates(self, queries: np.ndarray, wanted: int) -> np.ndarray:
        """Ids (Q, c) of keys that may be the nearest, -1 where there are fewer, in any order."""
        faiss = import_faiss()
        if self.kind == "hnsw":
            search = faiss.SearchParametersHNSW(efSearch=max(64, 2 * wanted))
            return self.index.search(queries, wanted, params=search)[1]
        return self.index.search(queries, wanted)[1]

    def exact(self, queries: np.ndarray, ids: np.ndarray, own: np.ndarray | None, k: int):
        """Distances from the keys themselves: queries (q, D), candidates (q, c) -> the k nearest,
        distances and ids (q, min(k, c))."""
        at = torch.from_numpy(np.maximum(ids, 0))
        found = torch.from_numpy(self.keys).index_select(0, at.view(-1)).float()  # (q*c, D)
        found = found.view(*ids.shape, -1).sub_(torch.from_numpy(queries).unsqueeze(1))
        distances = torch.linalg.vector_norm(found, dim=-1).square_().numpy()  # (q, c)
        distances[ids < 0] = np.inf
        if own is not None:
            distances[ids == own[:, None]] = np.inf
        order = np.lexsort((ids, distances), axis=-1)[:, :k]  # (q, k)
        return np.take_along_axis(distances, order, 1), np.take_along_axis(ids, order, 1)

def file_sha(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()

def commit_build(config: Config, identity: dict, kind: str) -> dict:
    """Rename what was built into place. The manifest goes first and comes last: whoever finds one
    finds the files that it describes."""
    folder = config.folder
    (folder / MANIFEST).unlink(missing_ok=True)
    for name in (KEYS, VALUES, INDEX):
        os.replace(folder / f"{name}.part", folder / name)
    manifest = identity | {"identity": identity_hash(identity), "index": kind, "config":
                           dataclasses.asdict(config), "torch": torch.__version__,
                           "index_sha256": file_sha(folder / INDEX), "settings": {}}
    write_json(folder / MANIFEST, manifest)
    for name in (f"{KEYS}.*of*", f"{VALUES}.*of*", f"{INDEX}.*of*", "build.*of*.json"):
        for path in folder.glob(name):
            path.unlink()
    return manifest

def build(config: Config, base: Base, domain: Domain) -> None:
    """Build the datastore, unless these very keys are there under this kind of index."""
    identity = identity_hash(described := build_identity(config, base, domain))
    old, count = read_json(config.folder / MANIFEST), described["count"]
    rank, _ = rank_and_size()
    require(config.knn_k < count, "knn_k", config.knn_k, f"below the keys of the datastore "
            f"({count:,})")
    if old.get("identity") == identity and config.index in ("auto", old["index"]):
        print(f"build: {config.model_dir} holds these {count:,} keys already ({old['index']})")
        return
    if rank == 0:
        print(f"build: {count:,} keys of {base.width} ({count * base.width * 2 / 2**20:,.0f} MiB)")
    began = time.perf_counter()
    build_shard(config, base, domain, identity)
    barrier()
    if rank == 0:
        merge_shards(config, count, base.width)
    barrier()
    keyed = time.perf_counter()
    kind = build_index(config, count)
    if rank == 0:
        commit_build(config, described, kind)
        print(f"build: keys {keyed - began:.0f} s, index {kind} {time.perf_counter() - keyed:.0f} "
              f"s, {(config.folder / INDEX).stat().st_size / 2**20:,.0f} MiB")
    barrier()

def read_manifest(config: Config) -> dict:
    """The manifest of model_dir. Raises FileNotFoundError where nothing was built."""
    manifest = read_json(config.folder / MANIFEST)
    if not manifest:
        raise FileNotFoundError(f"{config.folder / MANIFEST}: is not there; make it with python "
                                "memory_decoder.py build")
    needed = {"base", "count", "width", "vocab", "key", "index", "index_sha256", "identity",
              "settings", "config", "text_sha256", "domain", "tokenizer_sha256"}
    require(needed <= manifest.keys(), "file", str(config.folder / MANIFEST), "a whole manifest; "
            "delete it and build again")
    return manifest

def check_manifest(config: Config, base: Base, manifest: dict, domain: Domain | None = None
                   ) -> None:
    """Raise ValueError where a manifest is of another base, key, reading or domain."""
    require(domain is None or manifest["text_sha256"] == domain.fingerprint, "domain",
            config.domain, f"the text of the datastore ({manifest['domain']}, {manifest['count']:,}"
            " keys); name it, or build again")
    for name, mine in (("base_fingerprint", base.fingerprint), ("width", base.width),
                       ("vocab", base.vocab), ("key", config.key), ("window", base.window)):
        if manifest.get(name) != mine:
            shown = manifest.get("base") if name == "base_fingerprint" else manifest.get(name)
            mine = base.name if name == "base_fingerprint" else mine
            raise ValueError(f"{config.folder / MANIFEST}: was built with {name.split('_')[0]} "
                             f"{shown!r}, this is {mine!r}; name that one, or build again")

def open_datastore(config: Config, base: Base, manifest: dict) -> Datastore:
    """Map a built datastore. Raises ValueError or FileNotFoundError, one line, where a file is
    missing, of other sizes than the manifest says, or corrupt. No pickle is read."""
    faiss, found = import_faiss(), {}
    shapes = {KEYS: ((manifest["count"], manifest["width"]), "float16"),
              VALUES: ((manifest["count"],), "int32")}
    for name, (shape, dtype) in shapes.items():
        path = config.folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path}: is not there; build again")
        try:
            found[name] = np.load(path, mmap_mode="c", allow_pickle=False)  # torch wants to write
            fits = found[name].shape == shape and found[name].dtype == dtype
        except (ValueError, OSError, EOFError):
            fits = False
        require(fits, "file", str(path), f"{dtype} of shape {shape}, whole, as the manifest says; "
                "build again")
    path = config.folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{path}: is not there; build again")
    require(file_sha(path) == manifest["index_sha256"], "file", str(path), "the index that was "
            "built (it is corrupt, or of another build); build again")
    kind = manifest["index"]
    flags = {"flat": getattr(faiss, "IO_FLAG_MMAP_IFC", 0), "ivfpq": faiss.IO_FLAG_MMAP}
    try:
        index = faiss.read_index(str(path), flags.get(kind, 0))
    except RuntimeError:
        raise ValueError(f"{path}: is no index that this version of faiss reads; build again"
                         ) from None
    require((index.ntotal, index.d) == shapes[KEYS][0], "file", str(path), "of as many keys as the "
            "manifest says; build again")
    require(config.knn_k < index.ntotal, "knn_k", config.knn_k, "below the keys of the datastore "
            f"({index.ntotal:,})")
    if kind == "ivfpq":
        index.nprobe = min(config.nprobe, index.nlist)
    return Datastore(np.asarray(found[KEYS]), np.asarray(found[VALUES]), index, kind, config.rerank)

# ══ The kNN distribution, and mixing ═════════════════════════════════════════════════════════════
def knn_weights(distances: torch.Tensor, tau: float) -> torch.Tensor:
    """softmax(-d / tau) over neighbours (…, k); one that was not found (inf) has weight 0."""
    return torch.nan_to_num((-distances / tau).softmax(-1))

def knn_probabilities(distances: torch.Tensor, values: torch.Tensor, tau: float, vocab: int):
    """p_knn (Q, V): the weights of neighbours, distances and values (Q, k), summed by value."""
    dense = distances.new_zeros(len(distances), vocab)
    return dense.scatter_add_(1, values.long(), knn_weights(distances, tau))

def sparse_targets(distances: torch.Tensor, values: torch.Tensor, tau: float, width: int):
    """p_knn as its `width` heaviest tokens, renormalised -> tokens (Q, M), probabilities (Q, M);
    probability 0 fills up. Exact where the neighbours have at most `width` different values."""
    weights = knn_weights(distances, tau)  # (Q, k)
    values, order = values.long().sort(1)
    new = F.pad(values[:, 1:] != values[:, :-1], (1, 0), value=False)
    place = new.cumsum(1)  # (Q, k): which of the different values
    sums = torch.zeros_like(weights).scatter_add_(1, place, weights.gather(1, order))
    tokens = torch.zeros_like(values).scatter_(1, place, values)
    top = sums.topk(min(width, sums.shape[1]), dim=1)
    kept = top.values / top.values.sum(1, keepdim=True).clamp_min(1e-30)
    return tokens.gather(1, top.indices), kept

def sparse_kl(tokens: torch.Tensor, p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) (Q,) of sparse targets, tokens and p (Q, M), against log q (Q, V)."""
    return (torch.xlogy(p, p) - p * log_q.gather(1, tokens)).sum(1)

def mix(log_base: torch.Tensor, log_memory: torch.Tensor, alpha: float, mixing: str = "probability"
        ) -> torch.Tensor:
    """Two log-distributions (…, V) mixed. Probability: log((1 - alpha) p_base + alpha p_memory);
    works on single log-probabilities as well. Logits: softmax of the weighted mean of logits (log p
    is as good: a constant falls out). alpha 0 and 1 return base and memory themselves."""
    if alpha == 0:
        return log_base
    if alpha == 1:
        return log_memory
    if mixing == "logits":
        return ((1 - alpha) * log_base + alpha * log_memory).log_softmax(-1)
    return torch.logaddexp(log_base + math.log1p(-alpha), log_memory + math.log(alpha))

# ══ Memory decoder: hidden states, or tokens, to the vocabulary ══════════════════════════════════
def distance_bias(heads: int, reach: int) -> torch.Tensor:
    """What attention adds for query t and key j, reach + t - j tokens before it: minus that
    distance times a slope, another in every head, and -inf outside [0, reach). (H, reach, 2 reach).
    Press et al. 2022, "Train short, test long", arXiv 2108.12409: no position is learned, so that
    short training rows serve any window."""
    t, j = torch.arange(reach).unsqueeze(1), torch.arange(2 * reach)
    distance = reach + t - j  # (reach, 2 reach)
    slopes = 2.0 ** (-8 * torch.arange(1, heads + 1) / heads)
    bias = -slopes.view(-1, 1, 1) * distance
    return bias.masked_fill((distance < 0) | (distance >= reach), -math.inf)

class Block(nn.Module):
    """Pre-norm transformer block with causal attention over the last `reach` tokens."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor, bias: torch.Tensor, past):
        """x (B, T, C), T at most reach; bias of distance_bias; past, keys and values (2, B, H, P,
        C / H) of the tokens before, or None -> x, and what is the past of the next tokens."""
        B, T, C = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, C // self.heads)
        q, *kv = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, C / H) each
        kv = torch.stack(kv) if past is None else torch.cat([past, torch.stack(kv)], dim=3)
        reach, P = bias.shape[1], kv.shape[3] - T
        # Four dimensions: with three, a kernel that is five times slower is taken.
        mask = bias[None, :, :T, reach - P : reach + T]  # (1, H, T, P + T)
        mixed = F.scaled_dot_product_attention(q, kv[0], kv[1], attn_mask=mask)  # (B, H, T, C / H)
        x = x + self.out(mixed.transpose(1, 2).reshape(B, T, C))
        x = x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))
        return x, kv[:, :, :, -reach:]

class Decoder(nn.Module):
    """Imitates the kNN distribution without a datastore. kind hidden: reads the sequence of keys,
    so it needs no embedding and knows what the base knows, and serves that base alone.
    departs from the original, whose 32 heads attend over one vector, which does nothing: here they
    attend over the states before it. kind tokens: a small GPT-2 (with distances in place of its
    positions) and a tied head, which serves every base with the same tokenizer."""

    def __init__(self, kind: str, width: int, layers: int, heads: int, reach: int, vocab: int,
                 key_width: int):
        super().__init__()
        self.kind, self.reach = kind, reach
        self.sizes = dict(kind=kind, width=width, layers=layers, heads=heads, reach=reach,
                          vocab=vocab, key_width=key_width)
        if kind == "hidden":
            self.norm_in, self.enter = nn.LayerNorm(key_width), nn.Linear(key_width, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)  # tokens: its transpose embeds them
        self.register_buffer("bias", distance_bias(heads, reach), persistent=False)
        self.register_buffer("head_half", None, persistent=False)  # set by ready
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(weight)
            elif weight.dim() == 2 and name != "enter.weight":
                last = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * layers) if last else 0.02)

    def forward(self, keys, ids, cache: list | None = None) -> torch.Tensor:
        """keys (B, T, D) or ids (B, T), whichever the kind reads -> logits (B, T, V). `cache`, a
        list that is empty at first, holds what the next tokens attend to."""
        if self.kind == "hidden":
            x = self.enter(self.norm_in(keys))  # (B, T, C)
        else:
            x = F.embedding(ids, self.head.weight)  # (B, T, C)
        past = [None] * len(self.blocks) if not cache else cache
        parts = []
        for part in x.split(self.reach, dim=1):  # each attends to itself and the part before
            for i, block in enumerate(self.blocks):
                part, past[i] = block(part, self.bias, past[i])
            parts.append(part)
        if cache is not None:
            cache[:] = past
        x = self.norm(torch.cat(parts, dim=1))
        if self.head_half is not None and x.shape[:2] == (1, 1):
            return F.linear(x.half(), self.head_half).float()
        return self.head(x)

    def ready(self) -> "Decoder":
        """Frozen, for use. One token of one user takes as long as its weights take to be read, and
        most of them are the head's: for that case alone they are kept in half precision too (an
        error of a few 1e-3 in a logit, a third of the time on a CPU)."""
        self.head_half = self.head.weight.detach().half()
        return self.eval().requires_grad_(False)

@torch.no_grad()
def new_decoder(config: Config, base: Base, kind: str) -> Decoder:
    """A decoder that starts near the base: its head is the base's, seen through the directions P
    (D, C) in which the base's output embedding varies most, and hidden states enter through the
    same P. From a random head, a datastore of some million tokens teaches too little."""
    torch.manual_seed(config.seed)
    decoder = Decoder(kind, config.decoder_dim, config.decoder_layers, config.decoder_heads,
                      min(config.decoder_reach, base.window), base.vocab, base.width)
    embedding = base.model.get_output_embeddings().weight.detach().float().cpu()  # (V, D)
    directions = torch.linalg.eigh(embedding.T @ embedding).eigenvectors.flip(1)  # (D, D)
    P = F.pad(directions, (0, max(0, config.decoder_dim - base.width)))[:, : config.decoder_dim]
    decoder.head.weight.copy_(embedding @ P)
    if kind == "hidden":
        decoder.enter.weight.copy_(P.T)
    return decoder.to(base.device)

def arm_path(config: Config, arm: str) -> Path:
    name = "memory_decoder" if arm == config.decoder_kind else {
        "finetuned": "base_finetuned", "distilled": "decoder_distilled"}.get(arm, f"decoder_{arm}")
    return config.folder / f"{name}.pt"

def save_tensors(path: Path, payload: dict) -> None:
    """Tensors and plain values alone, written whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    torch.save(payload, temporary)
    os.replace(temporary, path)

def made_for(manifest: dict, kind: str) -> str:
    """What trained weights belong to: a datastore, or, for a decoder of tokens, which takes any
    base with its tokenizer, a tokenizer and a text."""
    if kind == "tokens":
        return sha(manifest["tokenizer_sha256"], manifest["text_sha256"])
    return manifest["identity"]

def load_tensors(path: Path, manifest: dict) -> dict:
    """What save_tensors wrote. Raises FileNotFoundError, or ValueError where it is foreign."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: is not there; make it with python memory_decoder.py "
                                "train")
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
        fits = payload["identity"] == made_for(manifest, payload.get("sizes", {}).get("kind"))
    except Exception:  # torch.load raises a dozen kinds on what it did not write
        raise ValueError(f"{path}: truncated or foreign; train again") from None
    require(fits, "file", str(path), "trained on the datastore that is there (it is of another); "
            "train again")
    return payload

def load_decoder(config: Config, arm: str, base: Base, manifest: dict) -> Decoder:
    """A trained decoder. Raises ValueError or FileNotFoundError with one line."""
    path = arm_path(config, arm)
    payload = load_tensors(path, manifest)
    try:
        sizes = payload["sizes"]
        fits = sizes["vocab"] == base.vocab and (
            sizes["kind"] == "tokens" or sizes["key_width"] == base.width)
        decoder = Decoder(**sizes)
        decoder.load_state_dict(payload["model_state_dict"])
    except (KeyError, TypeError, RuntimeError):
        fits = False
    require(fits, "file", str(path), "a decoder for this base; train again")
    return decoder.to(base.device).ready()

# ══ Scoring a stream: every system on the same windows, every position once ══════════════════════
class Scores(NamedTuple):
    """Of n positions of a stream, what each system gives to the token that really followed."""
    log_p: dict[str, np.ndarray]  # base and finetuned: (n,) log-probability
    mixed: dict[str, np.ndarray]  # decoders: (A, n) log-probability of base + decoder by alpha
    knn: np.ndarray  # (K, U, n) probability under p_knn by k and tau

def perplexity(log_p: np.ndarray) -> float:
    """exp of the mean over tokens; inf where a token has probability 0."""
    return float(np.exp(min(700.0, -np.mean(log_p, dtype=np.float64))))

def knn_columns(store: Datastore, queries: np.ndarray, targets: np.ndarray, taus, ks) -> np.ndarray:
    """p_knn of the targets (Q,) of queries (Q, D) for every k and tau -> (K, U, Q)."""
    if not ks:
        return np.zeros((0, 0, len(queries)), dtype=np.float32)
    distances, ids = store.search(queries, max(ks))
    hit = torch.from_numpy((store.values[np.maximum(ids, 0)] == targets[:, None]) & (ids >= 0))
    near = torch.from_numpy(distances)
    return np.stack([[(knn_weights(near[:, :k], tau) * hit[:, :k]).sum(1).numpy() for tau in taus]
                     for k in ks])

@torch.no_grad()
def score(config: Config, base: Base, stream: torch.Tensor, limit: int, decoders: dict,
          finetuned: Base | None = None, store: Datastore | None = None, taus=(), ks=(),
          alphas=(), label: str = "score") -> Scores:
    """Score every token of a stream but the first (of the first `limit` + 1, 0 = all), once."""
    from tqdm import tqdm
    stream = stream[: limit + 1 if limit else None]
    log_p: dict[str, list] = {"base": [], **({"finetuned": []} if finetuned else {})}
    mixed: dict[str, list] = {name: [] for name in decoders}
    knn = []
    groups = plan_windows(len(stream) - 1, base.window, config_stride(config, base),
                          config.batch_windows)
    for group in tqdm(groups, desc=label, unit="batch"):
        ids, logits, keys = read_group(base, stream, group)
        targets = stream[group[0].first + 1 : group[-1].end + 1]  # (m,)
        at = targets.to(base.device).unsqueeze(1)  # (m, 1)
        log_base = used(logits, group).log_softmax(-1)  # (m, V)
        log_p["base"].append(log_base.gather(1, at)[:, 0].cpu().numpy())
        for name, decoder in decoders.items():
            log_q = used(decoder(keys, ids.to(base.device)), group).log_softmax(-1)  # (m, V)
            if config.mixing == "logits":
                parts = [mix(log_base, log_q, a, "logits").gather(1, at)[:, 0] for a in alphas]
            else:
                pair = log_base.gather(1, at)[:, 0], log_q.gather(1, at)[:, 0]
                parts = [mix(*pair, a) for a in alphas]
            mixed[name].append(torch.stack(parts).cpu().numpy())  # (A, m)
        if finetuned:
            log_f = used(read_group(finetuned, stream, group)[1], group).log_softmax(-1)
            log_p["finetuned"].append(log_f.gather(1, at)[:, 0].cpu().numpy())
        if store is not None:
            knn.append(knn_columns(store, used(keys, group).cpu().numpy(), targets.numpy(), taus,
                                   ks))
    return Scores({name: np.concatenate(x) for name, x in log_p.items()},
                  {name: np.concatenate(x, axis=1) for name, x in mixed.items()},
                  np.concatenate(knn, axis=2) if knn else np.zeros((0, 0, 0)))

def add_knn(log_p: np.ndarray, p_knn: np.ndarray, share: float) -> np.ndarray:
    """log((1 - share) p + share p_knn), share in [0, 1)."""
    if share == 0:
        return log_p
    with np.errstate(divide="ignore"):
        return np.logaddexp(log_p + math.log1p(-share), np.log(p_knn) + math.log(share))

# ══ Tuning of the kNN distribution, on validation ════════════════════════════════════════════════
SHARES = tuple(i / 20 for i in range(20))  # of lambda and alpha: 0, 0.05 … 0.95
TAUS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)  # as parts of the mean distance of a neighbour

def tune_knn(config: Config, base: Base, domain: Domain, store: Datastore, manifest: dict) -> None:
    """Choose lambda, tau and k by validation perplexity of base + kNN; into the manifest, with the
    whole surface. What was tuned on the same datastore and grid stays."""
    made = sha(manifest["identity"], manifest["index_sha256"], config.knn_k, config.tune_tokens,
               config.rerank, config.nprobe)
    if manifest["settings"].get("tuned") == made:
        return
    sample = np.arange(0, len(store.keys), max(1, len(store.keys) // 256))
    near = store.search(store.keys[sample], config.knn_k, exclude=sample)[0]
    scale = float(near[np.isfinite(near)].mean())
    taus = [float(f"{part * scale:.3g}") for part in TAUS]
    ks = sorted({max(1, config.knn_k // part) for part in (1, 4, 16)})
    found = score(config, base, domain.valid, config.tune_tokens, {}, store=store, taus=taus, ks=ks,
                  label="kNN on validation")
    surface = np.array([[[perplexity(add_knn(found.log_p["base"], p, share)) for share in SHARES]
                         for p in by_tau] for by_tau in found.knn])  # (K, U, shares)
    i, j, m = np.unravel_index(surface.argmin(), surface.shape)
    print(f"\n  kNN-LM, validation perplexity ({len(found.log_p['base']):,} tokens); base alone "
          f"{surface[0, 0, 0]:,.2f}\n  k {ks[i]}" + "".join(f"{tau:>9g}" for tau in taus) + "  tau")
    for row, share in enumerate(SHARES[1::2]):
        print(f"  λ {share:.2f}" + "".join(f"{x:>9,.2f}" for x in surface[i, :, 1 + 2 * row]))
    print(f"  chosen: lambda {SHARES[m]}, tau {taus[j]:g}, k {ks[i]}: {surface[i, j, m]:,.2f} "
          f"(best by k: " + ", ".join(f"{k}: {x.min():,.2f}" for k, x in zip(ks, surface,
                                                                        strict=True)) + ")\n")
    manifest["settings"] = {"tuned": made, "lambda": SHARES[m], "tau": taus[j], "k": ks[i]}
    manifest["tuning"] = {"taus": taus, "ks": ks, "lambdas": list(SHARES), "surface":
                          surface.tolist()}
    write_json(config.folder / MANIFEST, manifest)

# ══ Training: one loop for the decoders, the plain distillation and the fine-tuned base ══════════
def write_targets(config: Config, base: Base, store: Datastore, manifest: dict, count: int):
    """The sparse kNN targets of the first `count` keys, each without itself, on disk: tokens
    (count, M) int32 and probabilities (count, M) float16. Made once for a tau and k."""
    from tqdm import tqdm
    tau, k = manifest["settings"]["tau"], manifest["settings"]["k"]
    width = min(config.target_width, k)
    paths = [config.folder / f"targets_{name}.npy" for name in ("tokens", "weights")]
    made = sha(manifest["identity"], manifest["index_sha256"], tau, k, width, config.rerank,
               config.nprobe)
    old = manifest.get("targets", {})
    if (old.get("made") != made or old["count"] < count or
            not all(path.is_file() for path in paths)):
        parts = [path.with_name(path.name + ".part") for path in paths]
        files = [open_part(path, (count, width), dtype)
                 for path, dtype in zip(parts, ("int32", "float16"), strict=True)]
        with tqdm(total=count, desc="targets", unit="key") as bar:
            for start in range(0, count, 1024):
                own = np.arange(start, min(start + 1024, count))
                distances, ids = store.search(store.keys[own], k, exclude=own)
                targets = sparse_targets(torch.from_numpy(distances), torch.from_numpy(
                    store.values[np.maximum(ids, 0)]), tau, width)
                for file, found in zip(files, targets, strict=True):
                    file[own] = found.numpy()
                bar.update(len(own))
        for file, part, path in zip(files, parts, paths, strict=True):
            file.flush()
            os.replace(part, path)
        manifest["targets"] = {"made": made, "count": count}
        write_json(config.folder / MANIFEST, manifest)
    return [np.load(path, mmap_mode="r", allow_pickle=False) for path in paths]

def batches(config: Config, count: int, window: int) -> list[np.ndarray]:
    """Starting positions of the rows of every training step, a fresh order and offset an epoch."""
    draw, rows = np.random.default_rng(config.seed), max(1, config.batch_tokens // window)
    found = []
    for _ in range(config.num_epochs):
        offset = int(draw.integers(0, max(1, min(window, count - window + 1))))
        starts = np.arange(offset, count - window + 1, window)
        draw.shuffle(starts)
        found += [starts[i : i + rows] for i in range(0, max(1, len(starts) // rows * rows), rows)]
    return found

def optimize(model: nn.Module, lr: float, steps: list, loss_of, label: str) -> None:
    """AdamW over every batch, warm-up and then cosine to a tenth, gradient norm at most 1."""
    from tqdm import tqdm
    groups = [{"params": [p for p in model.parameters() if (p.dim() >= 2) == matrix],
               "weight_decay": 0.01 * matrix} for matrix in (True, False)]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
    rates = dnc_gpt2.Config(lr=lr)
    with tqdm(steps, desc=label, unit="step") as bar:
        for step, starts in enumerate(bar):
            for group in optimizer.param_groups:
                group["lr"] = dnc_gpt2.learning_rate(step, len(steps), rates)
            loss, shown = loss_of(starts)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            require(math.isfinite(loss.item() + norm.item()), "decoder_lr", lr, f"smaller: {label} "
                    f"diverged at step {step}")
            optimizer.step()
            if step % 10 == 0:
                bar.set_postfix_str(shown)

def train_decoder(config: Config, base: Base, domain: Domain, store: Datastore, arm: str,
                  targets) -> Decoder:
    """beta KL(teacher || decoder) + (1 - beta) CE; the teacher is the kNN distribution. Controls in
    which the datastore has no part: arm text has no teacher (beta 0), in arm distilled it is the
    base itself. What the datastore adds is the difference to them."""
    kind = config.decoder_kind if arm in ("text", "distilled") else arm
    beta = 0.0 if arm == "text" else config.beta
    decoder, device = new_decoder(config, base, kind), base.device
    count = min(config.train_tokens or len(store.keys), len(store.keys))
    # The base as a teacher is given its whole window.
    window = min(base.window if arm == "distilled" else decoder.reach, count)

    def loss_of(starts: np.ndarray):
        at = starts[:, None] + np.arange(window)  # (B, T)
        ids, next_ids = domain.train[at].to(device), domain.train[at + 1].to(device)
        keys = None
        if kind == "hidden":
            keys = torch.from_numpy(store.keys[at]).to(device).float()  # (B, T, D)
        log_q = decoder(keys, ids).flatten(0, 1).log_softmax(-1)  # (B*T, V)
        ce = F.nll_loss(log_q, next_ids.flatten())
        if arm == "distilled":
            log_p = base.forward(ids)[0].flatten(0, 1).log_softmax(-1)  # (B*T, V)
            kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        else:
            tokens, p = (torch.from_numpy(x[at.ravel()]).to(device) for x in targets)  # (B*T, M)
            p = p.float()
            p = p / p.sum(1, keepdim=True).clamp_min(1e-30)
            kl = sparse_kl(tokens.long(), p, log_q).mean()
        shown = f"KL {kl.item():.3f} CE {ce.item():.3f}"
        return beta * kl + (1 - beta) * ce, shown

    steps = batches(config, count, window)
    optimize(decoder, config.decoder_lr, steps, loss_of, f"decoder {arm}")
    return decoder.eval().requires_grad_(False)

def finetune(config: Config, base: Base, domain: Domain, lr: float) -> Base:
    """A copy of the base, trained on as many tokens of the domain as the decoders."""
    torch.manual_seed(config.seed)
    count = min(config.train_tokens or len(domain.train), len(domain.train) - 1)
    window = min(base.window, count)
    model = copy.deepcopy(base.model).requires_grad_(True)
    prefix = torch.tensor(base.prefix, dtype=torch.int64)

    def loss_of(starts: np.ndarray):
        at = starts[:, None] + np.arange(window)  # (B, T)
        ids = torch.cat([prefix.expand(len(at), -1), domain.train[at]], dim=1).to(base.device)
        logits = model(input_ids=ids, use_cache=False).logits[:, len(prefix) :].float()
        ce = F.cross_entropy(logits.flatten(0, 1), domain.train[at + 1].flatten().to(base.device))
        return ce, f"CE {ce.item():.3f}"

    optimize(model, lr, batches(config, count, window), loss_of, f"fine-tuning at {lr:g}")
    return dataclasses.replace(base, model=model.eval().requires_grad_(False))

def train_finetuned(config: Config, base: Base, domain: Domain) -> dict:
    """Fine-tune at every rate, keep the better on validation -> payload of its file."""
    found = {}
    for lr in config.rates:
        tuned = finetune(config, base, domain, lr)
        scores = score(config, base, domain.valid, config.tune_tokens, {}, tuned)
        found[ppl := perplexity(scores.log_p["finetuned"])] = lr, tuned.model.state_dict()
        print(f"fine-tuned base at {lr:g}: validation perplexity {ppl:,.2f}")
    lr, weights = found[min(found)]
    return {"lr": lr, "model_state_dict": weights}

def train(config: Config, base: Base, domain: Domain) -> None:
    """Tune the kNN distribution if it is not yet, write the targets, train every arm."""
    manifest = read_manifest(config)
    check_manifest(config, base, manifest, domain)
    store = open_datastore(config, base, manifest)
    tune_knn(config, base, domain, store, manifest)
    count = min(config.train_tokens or len(store.keys), len(store.keys))
    targets = write_targets(config, base, store, manifest, count)
    manifest["settings"].pop("alpha", None)  # of decoders that are gone
    write_json(config.folder / MANIFEST, manifest)
    for arm in config.arm_list:
        began = time.perf_counter()
        if arm == "finetuned":
            payload = train_finetuned(config, base, domain)
        else:
            decoder = train_decoder(config, base, domain, store, arm, targets)
            payload = {"sizes": decoder.sizes, "model_state_dict": decoder.state_dict()}
            print(f"decoder {arm}: {count_parameters(decoder):,} parameters")
        kind = payload.get("sizes", {}).get("kind")
        save_tensors(arm_path(config, arm), payload | {"arm": arm, "identity":
                                                       made_for(manifest, kind)})
        print(f"wrote {arm_path(config, arm)} ({time.perf_counter() - began:.0f} s)", flush=True)

# ══ One model for many users: generation with caches, sampling, chat ═════════════════════════════
class Sampling(NamedTuple):
    """How to answer."""
    mode: str  # base | knn | decoder | both
    alpha: float  # share of the memory: of the decoder; in mode knn, of the kNN distribution
    temperature: float  # 0 = greedy
    top_k: int  # 0 = all
    max_new_tokens: int = 200
    seed: int = 0

class Neighbour(NamedTuple):
    """A stored position that voted."""
    token: str  # what followed there
    context: str  # the few tokens before it
    distance: float
    weight: float  # its share of the votes

class Step(NamedTuple):
    """One generated token. Probabilities are those before temperature and top_k."""
    token: int
    text: str  # what it adds to the answer; "" while a character is incomplete
    changed: bool  # the base alone, with the same noise, would have taken base_token
    base_token: str
    base_probability: float  # of the token, by the base alone
    probability: float  # of the token, by the mixture
    neighbours: list[Neighbour]  # the heaviest five; [] in mode base

@dataclasses.dataclass(frozen=True, eq=False)
class MemoryLM:
    """Everything loaded once, read-only, shared by all users."""
    name: str
    base: Base
    decoder: Decoder | None
    datastore: Datastore | None
    settings: dict  # tuned: alpha, lambda, tau, k, and both: alpha and lambda
    mixing: str = "probability"
    tokenizer = property(lambda self: self.base.tokenizer)
    window = property(lambda self: self.base.window)

    @staticmethod
    def load(config: Config) -> "MemoryLM":
        """What model_dir holds. Raises ValueError or FileNotFoundError, one clear line each."""
        manifest = read_manifest(config)
        settings = dict(manifest["settings"])
        if "alpha" not in settings:
            raise FileNotFoundError(f"{config.folder / MANIFEST}: holds no tuned settings; make "
                                    "them with python memory_decoder.py train, then tune")
        config = dataclasses.replace(  # what the datastore was made with
            config, key=manifest["key"], window=manifest["config"]["window"], knn_k=settings["k"],
            mixing=settings["mixing"])
        base = load_base(config, manifest["base"] if config.base == "auto" else config.base)
        check_manifest(config, base, manifest)
        store = open_datastore(config, base, manifest)
        decoder = load_decoder(config, config.decoder_kind, base, manifest)
        if config.alpha != "auto":
            settings["alpha"] = config.alpha
        return MemoryLM(f"{Path(base.name).stem} + {manifest['domain']}", base, decoder, store,
                        settings, config.mixing)

    def modes(self) -> list[str]:
        has = {"base": True, "knn": self.datastore is not None,
               "decoder": self.decoder is not None}
        return [mode for mode in MODES if has.get(mode, has["knn"] and has["decoder"])]

class Reading(NamedTuple):
    """What the models say of the next token of one conversation."""
    log_base: torch.Tensor  # (V,)
    query: torch.Tensor  # (D,)
    log_decoder: torch.Tensor | None  # (V,)

class Conversation:
    """The caches of one answer; it alone has them. When the window is full, the older half is
    dropped and the rest read again."""

    def __init__(self, lm: MemoryLM, mode: str):
        self.lm, self.ids, self.cache, self.decoder_cache = lm, [], None, None
        self.decoder = lm.decoder if mode in ("decoder", "both") else None

    @torch.no_grad()
    def feed(self, new: list[int]) -> Reading:
        """Read tokens after those read before."""
        from transformers import DynamicCache
        base, fed = self.lm.base, new
        if self.cache is None or len(self.ids) + len(new) > base.window:
            self.cache = DynamicCache()
            fed = [*self.ids, *new]
            fed = fed[-(base.window // 2):] if len(fed) > base.window else fed
            self.ids = []
            if self.decoder is not None:
                self.decoder_cache = []
        prefix = [] if self.ids else [*base.prefix]
        logits, keys = base.forward(torch.tensor([[*prefix, *fed]]), self.cache)
        log_decoder = None
        if self.decoder is not None:
            ids = torch.tensor([fed], device=base.device)
            out = self.decoder(keys[:, len(prefix) :], ids, self.decoder_cache)
            log_decoder = out[0, -1].log_softmax(-1)
        self.ids += fed
        return Reading(logits[0, -1].log_softmax(-1), keys[0, -1], log_decoder)

def nearest(lm: MemoryLM, query: torch.Tensor) -> tuple[torch.Tensor, np.ndarray, torch.Tensor]:
    """Neighbours of one query (D,): distances (k,), ids (k,) and values (k,)."""
    k = min(lm.settings["k"], len(lm.datastore.keys))
    distances, ids = lm.datastore.search(query.cpu().numpy()[None], k)
    kept = ids[0] >= 0
    ids = ids[0][kept]
    return torch.from_numpy(distances[0][kept]), ids, torch.from_numpy(lm.datastore.values[ids])

def distribution(lm: MemoryLM, mode: str, alpha: float, reading: Reading):
    """log p (V,) of the next token, and what nearest found (None where nothing was searched). Mode
    both: base and decoder by alpha, then the kNN distribution by the tuned lambda."""
    log_p, found, share = reading.log_base, None, alpha
    if mode in ("decoder", "both"):
        log_p = mix(log_p, reading.log_decoder, alpha, lm.mixing)
        share = lm.settings["both"]["lambda"]
    if mode in ("knn", "both") and share > 0:
        found = nearest(lm, reading.query)
        p = knn_probabilities(found[0][None], found[2][None], lm.settings["tau"], len(log_p))[0]
        log_p = mix(log_p, p.log().to(log_p.device), share)
    return log_p, found

def choose(log_p: torch.Tensor, noise: torch.Tensor, sampling: Sampling) -> int:
    """A token drawn from log p (V,) with Gumbel noise (V,), or, at temperature 0, the likeliest."""
    if sampling.temperature == 0:
        return int(log_p.argmax())
    if 0 < sampling.top_k < len(log_p):
        log_p = log_p.masked_fill(log_p < log_p.topk(sampling.top_k).values[-1], -math.inf)
    return int((log_p / sampling.temperature + noise).argmax())

def show_neighbours(lm: MemoryLM, found, token: int, most: int = 5) -> list[Neighbour]:
    """The heaviest neighbours, with the text before them; those that voted for the token first."""
    distances, ids, _ = found
    weights, values = knn_weights(distances, lm.settings["tau"]), lm.datastore.values
    order = sorted(range(len(ids)), key=lambda j: (values[ids[j]] != token, -weights[j]))[:most]
    return [Neighbour(lm.base.decode([int(values[ids[j]])]),
                      lm.base.decode(values[max(0, ids[j] - 8) : ids[j]].tolist()),
                      float(distances[j]), float(weights[j])) for j in order]

def generate(lm: MemoryLM, ids: list[int], sampling: Sampling) -> Iterator[Step]:
    """Answer token by token. Thread-safe: caches and noise belong to this call. Raises ValueError
    at once for settings that cannot be, and ends at an end-of-text token."""
    require(sampling.mode in lm.modes(), "mode", sampling.mode, "one of " + ", ".join(lm.modes()))
    require(0 <= sampling.alpha <= 1, "alpha", sampling.alpha, "from 0 to 1")
    require(0 <= sampling.temperature < math.inf, "temperature", sampling.temperature,
            "0 (greedy) or more")
    require(sampling.top_k >= 0, "top_k", sampling.top_k, "0 (all) or more")
    require(len(ids) > 0, "prompt", "", "some text")
    return steps_of(lm, ids, sampling)

def steps_of(lm: MemoryLM, ids: list[int], sampling: Sampling) -> Iterator[Step]:
    conversation, draw = Conversation(lm, sampling.mode), torch.Generator()
    draw.manual_seed(sampling.seed)
    answer, shown, fed, ends = [], "", list(ids), lm.base.end_ids()
    for number in range(sampling.max_new_tokens):
        reading = conversation.feed(fed)
        log_p, found = distribution(lm, sampling.mode, sampling.alpha, reading)
        noise = -torch.empty(len(log_p)).exponential_(generator=draw).log().to(log_p.device)
        token, plain = (choose(x, noise, sampling) for x in (log_p, reading.log_base))
        if token in ends:
            return
        changed = token != plain
        if changed and found is None and lm.datastore is not None:
            found = nearest(lm, reading.query)  # the decoder learned from such neighbours
        answer.append(token)
        fed = [token]
        text, whole = lm.base.decode(answer), ""
        if not text.endswith("\ufffd") or number + 1 == sampling.max_new_tokens:
            whole, shown = text[len(shown) :], text
        yield Step(token, whole, changed, lm.base.decode([plain]),
                   float(reading.log_base[token].exp()), float(log_p[token].exp()),
                   show_neighbours(lm, found, token) if found else [])

def chat_text(lm: MemoryLM, messages: list[dict]) -> str:
    """Messages under the base's chat template, or, without one, as plain text, a turn a line: a
    model that knows no chat continues what it is given."""
    if not getattr(lm.tokenizer, "chat_template", None):
        return "\n".join(message["content"] for message in messages)
    try:
        return lm.tokenizer.apply_chat_template(messages, tokenize=False,
                                                add_generation_prompt=True)
    except Exception as error:  # of a template, which may raise what it likes
        raise ValueError(f"messages: the chat template of {lm.base.name} refuses them ({error})"
                         ) from None

def chat_ids(lm: MemoryLM, messages: list[dict], reserve: int) -> tuple[list[int], int]:
    """The prompt of a conversation ({"role", "content"} each), and how many of its oldest turns
    were dropped, whole, so that it leaves `reserve` tokens of the window (at most half of it) for
    the answer. A system message stays. Raises ValueError for an empty or enormous message."""
    last = messages[-1]["content"] if messages else ""
    require(last.strip() != "", "message", last, "some text; it is empty")
    for message in messages:
        text = message["content"]
        require(len(text) <= MESSAGE_LIMIT, "message", text[:20] + "…", f"at most {MESSAGE_LIMIT:,}"
                f" characters ({len(text):,} are too many)")
        require(not re.search("[\ud800-\udfff]", text), "message", "…", "text in UTF-8")
    system = [m for m in messages[:1] if m["role"] == "system"]
    turns = [m for m in messages[len(system) :] if m["content"].strip()]
    room = lm.window - min(max(0, reserve), lm.window // 2)
    for dropped in range(len(turns)):
        if dropped and turns[dropped]["role"] != "user":
            continue  # an answer without its question; many templates refuse it as well
        ids = lm.base.encode(chat_text(lm, system + turns[dropped:]))
        prefix = len(lm.base.prefix)
        if prefix and tuple(ids[:prefix]) == lm.base.prefix:
            ids = ids[prefix:]  # what generate puts there itself
        if len(ids) <= room:
            return ids, dropped
    raise ValueError(f"message: has {len(ids):,} tokens, the window has room for {room:,}; shorten "
                     "it")

# ══ Evaluation: settings from validation, test once, latency, table, picture ═════════════════════
NAMES = {"base": "base", "knn": "kNN-LM", "hidden": "memory decoder (hidden)",
         "tokens": "memory decoder (tokens)", "both": "both", "finetuned": "fine-tuned base",
         "text": "decoder (text alone)", "distilled": "plain distillation"}

class Systems(NamedTuple):
    """What is compared, loaded."""
    manifest: dict
    store: Datastore
    decoders: dict[str, Decoder]
    finetuned: Base | None

def load_systems(config: Config, base: Base, domain: Domain) -> Systems:
    """Everything that train left. Raises ValueError or FileNotFoundError."""
    manifest = read_manifest(config)
    check_manifest(config, base, manifest, domain)
    store = open_datastore(config, base, manifest)
    decoders = {arm: load_decoder(config, arm, base, manifest)
                for arm in config.arm_list if arm != "finetuned"}
    finetuned = None
    if "finetuned" in config.arm_list:
        payload = load_tensors(arm_path(config, "finetuned"), manifest)
        model = copy.deepcopy(base.model)
        model.load_state_dict(payload["model_state_dict"])
        finetuned = dataclasses.replace(base, model=model)
    return Systems(manifest, store, decoders, finetuned)

def tune(config: Config, base: Base, domain: Domain) -> None:
    """Choose lambda, tau, k, and alpha of every decoder, on validation alone; into the manifest."""
    found = load_systems(config, base, domain)
    manifest, kind = found.manifest, config.decoder_kind
    tune_knn(config, base, domain, found.store, manifest)
    chosen = manifest["settings"]
    shares = [*SHARES, 1.0] if config.alpha == "auto" else [config.alpha]
    scores = score(config, base, domain.valid, config.tune_tokens, found.decoders, found.finetuned,
                   found.store, [chosen["tau"]], [chosen["k"]], shares, "validation")
    log_base, p_knn = scores.log_p["base"], scores.knn[0, 0]
    ppl = {"base": perplexity(log_base), "knn": perplexity(add_knn(log_base, p_knn,
                                                                    chosen["lambda"]))}
    alphas = {}
    for arm, mixed in scores.mixed.items():
        curve = [perplexity(x) for x in mixed]
        alphas[arm], ppl[arm] = shares[int(np.argmin(curve))], min(curve)
        print(f"  {NAMES[arm]}: " + ", ".join(
            f"alpha {a:g}: {x:,.2f}" for a, x in [*zip(shares, curve, strict=True)][::4]))
    grid = np.array([[perplexity(add_knn(x, p_knn, share)) for share in SHARES]
                     for x in scores.mixed[kind]])
    i, j = np.unravel_index(grid.argmin(), grid.shape)
    ppl["both"], both = float(grid[i, j]), {"alpha": shares[i], "lambda": SHARES[j]}
    if found.finetuned:
        ppl["finetuned"] = perplexity(scores.log_p["finetuned"])
    chosen |= {"alpha": alphas[kind], "alphas": alphas, "both": both, "mixing": config.mixing,
               "valid_ppl": ppl, "valid_tokens": len(log_base)}
    write_json(config.folder / MANIFEST, manifest)
    print(f"  chosen on {len(log_base):,} tokens of validation: alpha {alphas[kind]:g}; both: "
          f"alpha {both['alpha']:g}, lambda {both['lambda']:g}")

@torch.no_grad()
def latency(config: Config, base: Base, found: Systems, prompt: list[int]
            ) -> dict[str, list[float]]:
    """Milliseconds a generated token in every turn, greedy, one user: the systems take turns."""
    chosen = found.manifest["settings"]
    lm = MemoryLM("", base, None, found.store, chosen, config.mixing)
    runs = {"base": (lm, "base"), "knn": (lm, "knn")}
    for arm, decoder in found.decoders.items():
        runs[arm] = dataclasses.replace(lm, decoder=decoder), "decoder"
    runs["both"] = runs[config.decoder_kind][0], "both"
    if found.finetuned:
        runs["finetuned"] = dataclasses.replace(lm, base=found.finetuned), "base"
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(config.latency_rounds + 1):
        for name, (model, mode) in runs.items():
            alpha = chosen["lambda"] if name == "knn" else chosen["both"]["alpha"] if (
                name == "both") else chosen["alphas"].get(name, 0.0)
            conversation = Conversation(model, mode)
            reading = conversation.feed(prompt)
            began = time.perf_counter()
            for _ in range(config.latency_tokens):
                token = int(distribution(model, mode, alpha, reading)[0].argmax())
                reading = conversation.feed([token])
            if turn:  # the first warms up
                times[name].append(1e3 * (time.perf_counter() - began) / config.latency_tokens)
    return times

def evaluate(config: Config, base: Base, domain: Domain) -> None:
    """Score every system on test once, with what was chosen on validation; time them; write
    evaluation.json and the picture."""
    found = load_systems(config, base, domain)
    chosen = found.manifest["settings"]
    require(chosen.get("alpha") is not None and set(found.decoders) <= set(chosen["alphas"]) and
            chosen["mixing"] == config.mixing, "settings", found.manifest["domain"],
            "tuned for these systems: run python memory_decoder.py tune")
    alphas, both, kind = chosen["alphas"], chosen["both"], config.decoder_kind
    shares = sorted({*alphas.values(), both["alpha"]})
    scores = score(config, base, domain.test, config.eval_tokens, found.decoders, found.finetuned,
                   found.store, [chosen["tau"]], [chosen["k"]], shares, "test")
    log_base, p_knn = scores.log_p["base"], scores.knn[0, 0]
    pick = {arm: scores.mixed[arm][shares.index(alpha)] for arm, alpha in alphas.items()
            if arm in scores.mixed}
    mixed = scores.mixed[kind][shares.index(both["alpha"])]
    log_p = {"base": log_base, "knn": add_knn(log_base, p_knn, chosen["lambda"]), **pick,
             "both": add_knn(mixed, p_knn, both["lambda"])}
    log_p |= {"finetuned": scores.log_p["finetuned"]} if found.finetuned else {}
    room = min(32, base.window // 2)
    prompt = domain.test[:room].tolist()
    times = latency(config, base, found, prompt) if config.latency_tokens else {}
    rows = []
    for arm, name in NAMES.items():
        if arm in log_p:
            knn = chosen if arm in ("knn", "both") else {}
            share = both["lambda"] if arm == "both" else knn.get("lambda")
            rows.append({
                "system": name, "alpha": both["alpha"] if arm == "both" else alphas.get(arm),
                "lambda": share, "tau": knn.get("tau"), "k": knn.get("k"),
                "valid_ppl": chosen["valid_ppl"].get(arm), "test_ppl": perplexity(log_p[arm]),
                "ms_per_token": statistics.median(times[arm]) if times else None})
    about = {"base": base.name, "domain": domain.name, "valid_tokens": chosen["valid_tokens"],
             "test_tokens": len(log_base), "keys": len(found.store.keys), "index":
             found.store.kind, "mixing": config.mixing, "device": str(base.device), "torch":
             torch.__version__, "config": dataclasses.asdict(config)}
    write_json(config.folder / "evaluation.json", {"about": about, "rows": rows})
    print_table(rows, about)
    plot(config, rows, found.manifest, about)

def print_table(rows: list[dict], about: dict) -> None:
    """The comparison, each system against the base."""
    print(f"\n{RULE}\n  What does memory add?   {about['domain']}\n{RULE}\n"
          f"  {Path(about['base']).name}; {about['keys']:,} keys ({about['index']}); "
          f"{about['test_tokens']:,} tokens of test\n\n"
          f"  {'system':<24}{'alpha':>6}{'lambda':>7}{'tau':>8}{'k':>5}{'valid':>9}{'test':>9}"
          f"{'Δ test':>8}{'ms':>7}\n{LINE}")
    for row in rows:
        cells = [format(row[key], form) if row[key] is not None else "—" for key, form in (
            ("alpha", "g"), ("lambda", "g"), ("tau", "g"), ("k", "d"), ("valid_ppl", ",.2f"),
            ("test_ppl", ",.2f"), ("ms_per_token", ",.2f"))]
        change = row["test_ppl"] / rows[0]["test_ppl"] - 1
        print(f"  {row['system']:<24}{cells[0]:>6}{cells[1]:>7}{cells[2]:>8}{cells[3]:>5}"
              f"{cells[4]:>9}{cells[5]:>9}{change:>+8.1%}{cells[6]:>7}")
    by_name = {row["system"]: row for row in rows}
    base, knn = by_name["base"]["test_ppl"], by_name["kNN-LM"]["test_ppl"]
    print(LINE)
    for row in rows:
        if row["system"].startswith(("memory", "decoder", "plain")) and knn < base:
            share = (base - row["test_ppl"]) / (base - knn)
            times = [x["ms_per_token"] for x in (row, by_name["base"])]
            slower = f", {times[0] / times[1]:.2f} times the base's latency" if all(times) else ""
            print(f"  {row['system']}: {share:.0%} of the gain of kNN-LM{slower}")
    print("  settings chosen on validation, test scored once with them; ms a generated token")

def plot(config: Config, rows: list[dict], manifest: dict, about: dict) -> None:
    """plots/memory_decoder.png: validation perplexity over lambda and tau; test by system."""
    tuning = manifest["tuning"]
    k = tuning["ks"].index(manifest["settings"]["k"])
    surface = np.array(tuning["surface"][k]).T  # (shares, U)
    path = Path(config.plot_dir) / "memory_decoder.png"
    with dark_figure(path, 1, 2, (13, 5)) as (figure, axes):
        low = surface.min()
        image = axes[0].imshow(np.minimum(surface, 1.5 * low), aspect="auto", origin="lower",
                               cmap="viridis_r")
        axes[0].set_xticks(range(len(tuning["taus"])), [f"{x:g}" for x in tuning["taus"]])
        axes[0].set_yticks(range(0, len(SHARES), 2), [f"{x:g}" for x in SHARES[::2]])
        row, column = np.unravel_index(surface.argmin(), surface.shape)
        axes[0].plot(column, row, marker="*", ms=16, color="#ff8a65")
        axes[0].set(xlabel="tau", ylabel="lambda", title=f"kNN-LM, validation perplexity, k = "
                    f"{tuning['ks'][k]} (★ {low:,.2f})")
        figure.colorbar(image, ax=axes[0])
        names = [row["system"] for row in rows][::-1]
        values = [row["test_ppl"] for row in rows][::-1]
        bars = axes[1].barh(names, values, color=["#4fc3f7" if name == "base" else "#ffb347"
                                                  for name in names])
        axes[1].bar_label(bars, [f"{x:,.2f}" for x in values], padding=3, fontsize=9)
        axes[1].set(xlabel="perplexity", title=f"test, {about['test_tokens']:,} tokens",
                    xlim=(0, 1.15 * max(values)))
        figure.suptitle(f"{Path(about['base']).stem}, {about['domain']}, {about['keys']:,} keys",
                        fontsize=11)

# ══ Main ═════════════════════════════════════════════════════════════════════════════════════════
def print_banner(config: Config, base: Base, domain: Domain) -> None:
    """Print all that a reader needs to judge the figures."""
    import transformers
    device = (torch.cuda.get_device_name() if base.device.type == "cuda" else
              f"CPU, {torch.get_num_threads()} threads")
    print(f"{RULE}\n  memory_decoder: plug a domain into a frozen model\n{RULE}\n"
          f"  base      {base.name}: {count_parameters(base.model):,} parameters, window "
          f"{base.window}, {base.vocab:,} tokens\n"
          f"  domain    {domain.name}: train {len(domain.train):,}, validation "
          f"{len(domain.valid):,}, test {len(domain.test):,} tokens\n"
          f"  device    {device}\n  versions  Python {platform.python_version()}, torch "
          f"{torch.__version__}, transformers {transformers.__version__}")
    fields = [f"{key}={value}" for key, value in dataclasses.asdict(config).items() if value != ""]
    print(textwrap.fill(" ".join(fields), 96, initial_indent="  config    ",
                        subsequent_indent=" " * 12, break_long_words=False), flush=True)

def run(config: Config, commands: tuple[str, ...]) -> None:
    """The parts asked for, in order. Of several processes all build, the first does the rest."""
    rank, size = rank_and_size()
    check_folder(config, "model_dir")
    check_folder(config, "plot_dir")
    import_faiss()
    with folder_lock(config.folder) if rank == 0 else contextlib.nullcontext():
        name = config.base
        if name == "auto" and "build" not in commands:
            name = read_manifest(config)["base"]
        elif name == "auto":
            name = newest_own(config)
        base = load_base(config, name)
        domain = load_domain(config, base)
        if rank == 0:
            print_banner(config, base, domain)
        for command in commands if rank == 0 else commands[: "build" in commands]:
            {"build": build, "train": train, "tune": tune, "evaluate": evaluate}[command](
                config, base, domain)

def main(argv: list[str]) -> int:
    """Run a command line -> exit code: 0, 2 a user's mistake, 128 + signal stopped."""
    if {"-h", "--help"} & set(argv):
        print_help(Config, __doc__, {}, "one a line")
        return 0

    def stop(number, frame):
        raise KeyboardInterrupt(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        commands = (argv[0],) if argv[:1] and not argv[0].startswith("-") else COMMANDS
        require(set(commands) <= set(COMMANDS), "command", commands[0],
                "one of " + ", ".join(COMMANDS))
        run(Config(**parse_overrides(Config, argv[len(commands) == 1 :])), commands)
    except KeyboardInterrupt as stopped:
        print("\nstopped; what was built is kept. The same command goes on:\n"
              "  python memory_decoder.py " + shlex.join(argv), file=sys.stderr)
        return 128 + int(str(stopped) or signal.SIGINT)
    except (ValueError, OSError, MemoryError, torch.cuda.OutOfMemoryError) as error:
        print(f"error: {str(error) or 'out of memory'}", file=sys.stderr)
        return 2
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    sys.exit(main(sys.argv[1:]))

"""Keys and values of a frozen language model on disk, an index over them, and the kNN distribution.

A key is what the base computes at a position of a text, a value the token that followed there. So
the base stands here, with the tap on its forward pass: who opens a datastore has to have the base
that made it, and must read as it read. What is done with a datastore stands above this file:
memory_lm.py answers with it, memory_decoder.py builds it, tunes it and trains on it.

Read downward; each section uses only what stands above it.
kNN-LM is Khandelwal et al. 2020, arXiv 1911.00172. Position i of a text is a query for its token
i + 1; one key is stored for each.
Letters: B rows, T tokens, D width of a key, V vocabulary, P tokens of the prefix, n stored keys,
Q queries, k neighbours, c candidates, m positions that a group of windows is read for.
"""

import dataclasses
import functools
import hashlib
import inspect
import json
import math
import os
import re
import shutil
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

# isort: off
from dnc_gpt2 import (
    # checks
    check_memory,
    controller_parameters,
    require,
    # files
    file_sha,
    growing,
    read_json,
    reading,
    whole_file,
    write_json,
    # processes and devices
    launched,
    local_device,
    # data and model
    asking_hub,
    encode_text,
    load_checkpoint,
)
from packaged import NAME as PACKAGED
from packaged import packaged_base
# isort: on

KEYS, VALUES, INDEX = "datastore_keys.npy", "datastore_values.npy", "faiss_index.bin"
STATES = "datastore_states.npy"  # of a base with a tail: what enters its last blocks
SCALE = "datastore_scale.npy"  # of the keys, made with the index
MANIFEST, SOURCES = "manifest.json", "sources.json"
FLAT_UP_TO = 20_000  # keys: a query that reads them all is soon slower than the model itself
NPROBE = 256  # lists of ivfpq that a search visits, as shipped
RERANK = 4  # candidates of ivfpq a neighbour, as shipped


def sha(*parts: object) -> str:
    """Return the sha256 of bytes and of the text of everything else."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else repr(part).encode())
    return digest.hexdigest()


# ══ Base: any causal language model, and the keys of its forward pass ════════════════════════════
class KeyTap:
    """The keys, and where they are wanted the states, of the forward pass that this same thread ran
    last.

    Hooks take what enters the last feed-forward, or what leaves the final norm, and what enters one
    of the last blocks. It is kept by thread, so that users who share the model never see each
    other's.
    """

    def __init__(self, model: nn.Module, key: str, tail: int = 0):
        self.key = key  # feed_forward | final
        self.here = threading.local()
        if key == "final":
            # Not what enters the head: transformers gives it the rows of logits_to_keep alone.
            model.base_model.register_forward_hook(self.take_final)
        else:
            self.hook_onto(last_feed_forward(model), "keys")
        # The states are what enters the last so many blocks, at most all; 0 = none are taken.
        self.tail = min(tail, model.config.get_text_config().num_hidden_layers)
        if self.tail:
            self.hook_onto(blocks_of(model)[-self.tail], "states")

    def __deepcopy__(self, memo: dict) -> "KeyTap":
        return self  # a copy of the model, to be fine-tuned, may share it

    def take_final(self, module: nn.Module, args: tuple, out: tuple) -> None:
        """Keep as keys what the model gives to its head."""
        self.here.keys = out[0]

    def hook_onto(self, module: nn.Module, name: str) -> None:
        """Keep under a name what enters a module."""

        def take(module: nn.Module, args: tuple, kwargs: dict) -> None:
            inputs = [*args, *kwargs.values()]
            setattr(self.here, name, inputs[0])

        module.register_forward_pre_hook(take, with_kwargs=True)


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """Return the blocks of a causal language model. Raises ValueError where none are found."""
    layers = model.config.get_text_config().num_hidden_layers
    for blocks in model.modules():
        if isinstance(blocks, nn.ModuleList) and len(blocks) == layers:
            return blocks
    raise ValueError(f"base: a {model.config.model_type} has no list of its {layers} blocks")


def last_feed_forward(model: nn.Module) -> nn.Module:
    """Return the feed-forward of the last block; what enters it has passed its norm. Raises
    ValueError where the block has none of a known name."""
    last = blocks_of(model)[-1]
    for name in ("mlp", "feed_forward", "ffn", "fc1"):
        module = getattr(last, name, None)
        if isinstance(module, nn.Module):
            return module
    raise ValueError(f"key = 'feed_forward': the last block of a {model.config.model_type} has no "
                     "feed-forward that is found; set --key final")


@functools.cache
def cache_argument(kind: type[nn.Module]) -> str:
    """What this version of transformers calls the cache in the forward of a kind of model."""
    names = inspect.signature(kind.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


@dataclasses.dataclass(frozen=True, eq=False)
class Base:
    """A frozen causal language model. It is only read, so that every thread may run it."""

    name: str  # as --base takes it
    model: nn.Module
    tokenizer: object  # transformers.PreTrainedTokenizerFast
    window: int  # tokens at once, without the prefix
    prefix: tuple[int, ...]  # what its tokenizer puts before every text (Gemma: <bos>)
    own: bool  # trained by dnc_gpt2.py, whose texts are tokenized by line
    tap: KeyTap
    fingerprint: str  # of weights and vocabulary

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def vocab(self) -> int:
        """V, the tokens that it gives a probability to."""
        return self.model.get_output_embeddings().weight.shape[0]

    @property
    def width(self) -> int:
        """D, the width of its hidden states, which is that of a key."""
        return self.model.get_output_embeddings().weight.shape[1]

    @property
    def layer(self) -> int:
        """The number of its last block, which the keys come from."""
        return self.model.config.get_text_config().num_hidden_layers - 1

    @torch.no_grad()
    def forward(self, ids: torch.Tensor, cache=None, kept: int = 0
                ) -> tuple[torch.Tensor, torch.Tensor]:
        """Read ids (B, T) -> float32 logits (B, T, V), or (B, kept, V) of the last so many tokens,
        and keys (B, T, D). `cache`, a transformers DynamicCache, holds what was read before and is
        extended. Raises ValueError where this model gives no key of its width for every token."""
        options = {cache_argument(type(self.model)): cache, "use_cache": cache is not None,
                   "logits_to_keep": kept}  # over 50,000 tokens, logits take most of the memory
        out = self.model(input_ids=ids.to(self.device), **options)
        keys = self.tap.here.keys
        other = "feed_forward" if self.tap.key == "final" else "final"
        require(keys.shape == (*ids.shape, self.width), "key", self.tap.key,
                f"a state of {self.width} numbers for each of {tuple(ids.shape)} tokens (those of "
                f"{self.model.config.model_type} are {tuple(keys.shape)}); set --key {other}")
        return out.logits.float(), keys.float()

    @property
    def states(self) -> torch.Tensor | None:
        """What entered the last `tail` blocks in this thread's last forward (B, T, D); None where
        that is not taken."""
        return self.tap.here.states.float() if self.tap.tail else None

    def encode(self, text: str) -> list[int]:
        """Tokenize a text as the base was trained to read it, ours by line, without the prefix."""
        # Not the tokenizer's own call, which sets padding on the shared object in every thread.
        backend = self.tokenizer.backend_tokenizer
        if self.own:
            return encode_text(backend, text)
        return backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of tokens."""
        return self.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=True)

    def end_ids(self) -> set[int]:
        """Return the tokens that end an answer; none for a tokenizer that we trained."""
        settings = getattr(self.model, "generation_config", None)
        ends = getattr(settings, "eos_token_id", None)
        ends = ends if isinstance(ends, list) else [ends]
        return {i for i in (*ends, self.tokenizer.eos_token_id) if i is not None}


def fingerprint(model: nn.Module, tokenizer) -> str:
    """Return a digest of every weight's name and shape, of up to 4,096 of its numbers, and of the
    vocabulary."""
    digest = hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode())
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().flatten()
        step = max(1, len(flat) // 4096)
        sample = flat[::step].float().cpu().numpy()
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(sample.tobytes())
    return digest.hexdigest()


def own_base(path: str) -> tuple[nn.Module, object]:
    """Load a checkpoint of dnc_gpt2.py as (GPT2LMHeadModel, tokenizer). Raises ValueError."""
    from tokenizers import Tokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    payload = load_checkpoint(path)
    trained = payload["model_state_dict"]
    require(not any(name.startswith("memory.") for name in trained), "base", path,
            f"a checkpoint without a memory (this is {payload['arm']}); GPT2_Baseline_* is one")

    with reading(path, "name another checkpoint"):
        weights = {"transformer." + name.removeprefix("controller."): weight
                   for name, weight in trained.items()}
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
        settings = GPT2Config.from_dict(json.loads(payload["controller"]))
        check_memory(4 * controller_parameters(settings), "base")
        model = GPT2LMHeadModel(settings)
        model.load_state_dict(weights)
        tokenizer = Tokenizer.from_str(payload["tokenizer"])
        return model, PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def foreign_base(name: str) -> tuple[nn.Module, object]:
    """Load a causal LM by hub name or folder as (model, tokenizer), in float32 whatever its file
    holds: what is trained on it is, and in bfloat16 most steps of training would round away. Raises
    ValueError, which says how to log in where access has to be asked for. Weights are taken as
    safetensors alone, never as a pickle."""
    try:
        with asking_hub("base", name, "a folder written by save_pretrained"):
            from transformers import AutoModelForCausalLM, AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(
                name, dtype=torch.float32, use_safetensors=True, trust_remote_code=False)
    except ValueError as refused:
        if re.search(r"gated|\b40[13]\b", str(refused.__context__), re.IGNORECASE):
            raise ValueError(f"base = {name!r}: is gated; ask for access on its page, log in with "
                             "`hf auth login`, then run this again") from None
        raise
    backend = getattr(tokenizer, "backend_tokenizer", None)
    encodes = backend is not None and backend.encode("word", add_special_tokens=False).ids
    require(bool(encodes), "base", name, "with a fast tokenizer that encodes text (tokenizer.json)")
    backend.no_padding()
    backend.no_truncation()
    return model, tokenizer


def prefix_of(tokenizer) -> tuple[int, ...]:
    """Return what a tokenizer puts before every text: its begin-of-text token, or nothing."""
    begin = tokenizer.bos_token_id
    ids = tokenizer.backend_tokenizer.encode("word").ids
    puts_it = begin is not None and ids[:1] == [begin]
    return (begin,) if puts_it else ()


def is_own(name: str) -> bool:
    """Whether the base of that name is a checkpoint of dnc_gpt2.py."""
    return name.endswith(".pt") or Path(name).is_file()


def load_base(name: str, window: int, key: str, tail: int = 0) -> Base:
    """Load the base that --base names, to be read in windows of so many tokens, with keys from its
    last feed_forward or its final state, and states from before its last `tail` blocks. Raises
    ValueError with one line that says what to do."""
    own = is_own(name)
    if own:
        model, tokenizer = own_base(name)
    else:
        model, tokenizer = foreign_base(str(packaged_base()) if name == PACKAGED else name)
    model = model.eval().requires_grad_(False).to(local_device())

    settings = model.config.get_text_config()
    positions = getattr(settings, "max_position_embeddings", None) or window
    if positions < window:
        print(f"window: {positions}, the positions of {Path(name).name} (asked: {window})")

    prefix = prefix_of(tokenizer)
    return Base(
        name=name,
        model=model,
        tokenizer=tokenizer,
        window=min(window, positions) - len(prefix),
        prefix=prefix,
        own=own,
        tap=KeyTap(model, key, tail),
        fingerprint=fingerprint(model, tokenizer))


# ══ Reading a stream in windows: the same for the datastore and for every system ═════════════════
class Window(NamedTuple):
    """Positions start .. end - 1 are read; from `first` on they are used, each exactly once."""

    start: int
    first: int
    end: int

    @property
    def count(self) -> int:
        """Positions that are used, the last of its row."""
        return self.end - self.first


def plan_windows(positions: int, window: int, stride: int, batch: int) -> list[list[Window]]:
    """Cover positions 0 .. n - 1 by windows, in groups of at most `batch`.

    Each position is read with at least window - stride tokens before it (in the first window: with
    what there is). All windows are equally long, without padding. Groups do not depend on where a
    build begins: resumed, or in shards, it computes the same.
    """
    windows = [Window(0, 0, min(window, positions))]
    while windows[-1].end < positions:
        first = windows[-1].end
        end = min(first + stride, positions)
        windows.append(Window(end - window, first, end))
    return [windows[i : i + batch] for i in range(0, len(windows), batch)]


def most_used(group: list[Window]) -> int:
    """The most positions that a window of a group is read for."""
    return max(window.count for window in group)


def used(x: torch.Tensor, group: list[Window]) -> torch.Tensor:
    """Take from rows (B, …) of a group, which end where it ends, the positions that it is read for,
    in order (m, …)."""
    parts = [row[len(row) - window.count :]
             for row, window in zip(x, group, strict=True)]
    return torch.cat(parts)


def stack_group(base: Base, stream: torch.Tensor, group: list[Window]) -> torch.Tensor:
    """The tokens of a group behind the prefix (B, P + T)."""
    ids = torch.stack([stream[window.start : window.end] for window in group])  # (B, T)
    prefix = torch.tensor(base.prefix, dtype=torch.int64)  # (P,)
    prefixes = prefix.expand(len(ids), -1)  # (B, P)
    return torch.cat([prefixes, ids], dim=1)


def read_group(base: Base, stream: torch.Tensor, group: list[Window]
               ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Read a group in one forward pass -> ids (B, T), keys (B, T, D), the prefix left out, and the
    logits (m, V) of the positions that it is read for."""
    ids = stack_group(base, stream, group)
    logits, keys = base.forward(ids, kept=most_used(group))
    skipped = len(base.prefix)
    return ids[:, skipped:], keys[:, skipped:], used(logits, group)


def read_keys(base: Base, stream: torch.Tensor, group: list[Window]
              ) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Read a group for its keys alone (m, D), of the positions that it is read for, and its states
    (m, D), None where none are taken."""
    _, keys = base.forward(stack_group(base, stream, group), kept=1)
    states = base.states
    return used(keys, group), None if states is None else used(states, group)


# ══ Building: keys and values in blocks, in shards, resumed where a build was killed ═════════════
class Source(NamedTuple):
    """Where a document of the stream is from."""

    start: int  # its first token in the stream
    name: str  # a file below the domain's folder, a topic, a row
    line: int  # of that file, which it begins with; 0 = the file holds more than the document


class Build(NamedTuple):
    """What a datastore is built from, where, and how."""

    folder: Path
    base: Base
    stream: torch.Tensor  # (n + 1,) int64, the training text of the domain
    domain: str  # its name
    text_sha256: str  # of the stream
    stride: int  # tokens between windows
    batch_windows: int  # windows of one forward pass
    index: str  # auto | flat | ivfpq | hnsw
    sources: list[Source]  # of the documents of the stream, in order
    extra: dict  # what else the manifest shall say

    @property
    def count(self) -> int:
        """n, the keys that there will be."""
        return len(self.stream) - 1

    def describe(self) -> dict:
        """Return all that decides the bytes of the datastore, as the manifest holds it."""
        vocabulary = sorted(self.base.tokenizer.get_vocab().items())
        more = {"tail": self.base.tap.tail} if self.base.tap.tail else {}
        if self.base.tap.key == "final":
            more |= {"final": "of every token"}
        return more | {
            "base": self.base.name, "base_fingerprint": self.base.fingerprint,
            "key": self.base.tap.key, "layer": self.base.layer, "window": self.base.window,
            "stride": self.stride, "batch_windows": self.batch_windows, "domain": self.domain,
            "text_sha256": self.text_sha256, "count": self.count, "width": self.base.width,
            "vocab": self.base.vocab, "key_dtype": "float16", "value_dtype": "int32",
            "tokenizer_sha256": sha(vocabulary)}


def identity_hash(description: dict) -> str:
    """Return a digest of a description. A base is known by its weights and a domain by its text:
    their names do not matter."""
    named = [item for item in description.items() if item[0] not in ("base", "domain")]
    return sha(sorted(named))


def rank_and_size() -> tuple[int, int]:
    """Return this process's number and their count, as torchrun started them; (0, 1) alone."""
    return launched()[:2]


def share_of(count: int) -> tuple[int, int]:
    """Return the first of `count` things that is this rank's, and the first that is no more."""
    rank, size = rank_and_size()
    return rank * count // size, (rank + 1) * count // size


def barrier() -> None:
    """Wait for every rank; one alone waits for nobody."""
    if rank_and_size()[1] > 1:
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=timedelta(days=7))
        dist.barrier()


def shard_path(folder: Path, name: str, rank: int) -> Path:
    """Return where a rank writes its part of a file; one alone writes what will be the file."""
    _, size = rank_and_size()
    ending = "part" if size == 1 else f"{rank}of{size}"
    return folder / f"{name}.{ending}"


def open_part(path: Path, shape: tuple[int, ...], dtype: str, resume: bool = False) -> np.memmap:
    """Map a file under construction, as it is or anew. Raises ValueError where it would not fit: a
    full disk under a memory-mapped file kills the process without a word."""
    with growing(path):
        if resume:
            part = np.lib.format.open_memmap(path, "r+")
            require((part.shape, part.dtype) == (shape, np.dtype(dtype)), "file", str(path),
                    f"{dtype} of shape {shape}; delete it and build again")
            return part
        need = math.prod(shape) * np.dtype(dtype).itemsize / 2**20  # MiB
        free = shutil.disk_usage(path.parent).free / 2**20  # MiB
        require(free > need, "model_dir", str(path.parent), f"on a disk with {need:,.0f} MiB free "
                f"for {path.name} ({free:,.0f} are)")
        return np.lib.format.open_memmap(path, "w+", dtype, shape)


def array_files(count: int, width: int, tail: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """The files of arrays that a build writes: name -> shape and dtype."""
    files = {KEYS: ((count, width), "float16"), VALUES: ((count,), "int32")}
    if tail:
        files[STATES] = ((count, width), "float16")
    return files


def open_shard(job: Build, identity: str, progress: Path, count: int
               ) -> tuple[dict[str, np.memmap], int]:
    """Map this rank's `count` rows of every array -> the arrays by name, and how many groups of
    windows a killed build of the same identity has already written."""
    rank, _ = rank_and_size()
    files = array_files(count, job.base.width, job.base.tap.tail)
    paths = {name: shard_path(job.folder, name, rank) for name in files}
    state = read_json(progress, "delete it and build again")
    resume = state.get("identity") == identity and all(path.is_file() for path in paths.values())
    if not resume:
        progress.unlink(missing_ok=True)
    done = state["groups"] if resume else 0
    require(isinstance(done, int) and done >= 0, "file", str(progress), "of this build; delete it "
            "and build again")
    arrays = {name: open_part(paths[name], shape, dtype, resume)
              for name, (shape, dtype) in files.items()}
    return arrays, done


def write_group(job: Build, group: list[Window], begin: int, arrays: dict[str, np.memmap]) -> None:
    """Compute the rows of a group and flush them, from row 0 at position `begin`."""
    first = group[0].first
    end = group[-1].end
    keys, states = read_keys(job.base, job.stream, group)
    block = {KEYS: keys, STATES: states}
    block = {name: x.half().cpu().numpy() for name, x in block.items() if x is not None}  # (m, D)
    for x in block.values():
        require(np.isfinite(x).all(), "key", job.base.tap.key, "finite in float16, and is not at "
                f"position {first}; set --key final, or --decoder_kind hidden")
    block[VALUES] = job.stream[first + 1 : end + 1].numpy()
    rows = slice(first - begin, end - begin)
    with growing(job.folder / KEYS):
        for name, array in arrays.items():
            array[rows] = block[name]
            array.flush()


def build_shard(job: Build, identity: str) -> None:
    """Write this rank's rows of every array, group after group, from where a killed build
    stopped. What the progress file counts has been flushed to disk before."""
    from tqdm import tqdm

    rank, size = rank_and_size()
    groups = plan_windows(job.count, job.base.window, job.stride, job.batch_windows)
    require(len(groups) >= size, "domain", job.domain, f"longer for {size} processes")
    low, high = share_of(len(groups))
    mine = groups[low:high]
    begin = mine[0][0].first
    end = mine[-1][-1].end

    progress = job.folder / f"build.{rank}of{size}.json"
    arrays, done = open_shard(job, identity, progress, end - begin)
    position = mine[done][0].first if done < len(mine) else end
    if done > 0:
        print(f"build: resumed at position {position:,}")

    with tqdm(total=end - begin, initial=position - begin, desc="keys", unit="key",
              disable=rank > 0) as bar:
        for number, group in enumerate(mine[done:], done + 1):
            write_group(job, group, begin, arrays)
            write_json({"identity": identity, "groups": number}, progress)
            bar.update(group[-1].end - group[0].first)


def merge_shards(folder: Path, files: dict[str, tuple[tuple[int, ...], str]]) -> None:
    """Copy the shards of all ranks into one file an array, still under temporary names. One rank
    alone has written in place."""
    _, size = rank_and_size()
    if size == 1:
        return
    # A build by one process, killed before, left its progress: it tells of the file made anew here.
    (folder / "build.0of1.json").unlink(missing_ok=True)
    for name, (shape, dtype) in files.items():
        path = folder / f"{name}.part"
        whole, at = open_part(path, shape, dtype), 0
        for rank in range(size):
            shard = np.load(shard_path(folder, name, rank), mmap_mode="r", allow_pickle=False)
            for start in range(0, len(shard), 2**16):
                block = shard[start : start + 2**16]
                whole[at : at + len(block)] = block
                at += len(block)
        with growing(path):
            whole.flush()


# ══ Scale: what makes keys comparable ════════════════════════════════════════════════════════════
class Scale(NamedTuple):
    """Mean and spread of every dimension of the stored keys.

    A pretrained base's states are far from the origin in a few dimensions, and vary there most (in
    SmolLM2 with 45 times the median variance): of such keys product quantisation finds a tenth of
    the nearest, and their order is a little worse (docs/lab-notes.md, 23).
    """

    mean: np.ndarray  # (D,) float32
    factor: np.ndarray  # (D,) float32: one over the standard deviation, 0 where there is none

    @staticmethod
    def of(keys: np.ndarray) -> "Scale":
        """Measure keys (n, D), some at a time."""
        total = np.zeros(keys.shape[1])
        squares = np.zeros(keys.shape[1])
        for start in range(0, len(keys), 2**14):
            block = np.asarray(keys[start : start + 2**14], dtype=np.float64)
            total += block.sum(0)
            squares += (block**2).sum(0)
        mean = total / len(keys)
        variance = squares / len(keys) - mean**2
        varies = variance > 1e-12 + 2.0**-22 * mean**2  # by more than float16 rounds
        factor = np.where(varies, 1 / np.sqrt(np.where(varies, variance, 1)), 0)
        return Scale(mean.astype(np.float32), factor.astype(np.float32))

    def unit(self, x: np.ndarray) -> np.ndarray:
        """Standardise keys or queries (m, D) and divide each by its length -> float32 (m, D); what
        has none stays zero."""
        z = np.array(x, dtype=np.float32)
        z -= self.mean
        z *= self.factor
        length = np.linalg.norm(z, axis=1, keepdims=True)
        z /= np.maximum(length, 1e-12)
        return z


# ══ Index: candidates from FAISS ═════════════════════════════════════════════════════════════════
def import_faiss():
    """Import faiss, on as many threads as torch has. Only the datastore needs it."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads slow torch's tenfold
    try:
        import faiss
    except ImportError:
        raise ValueError("index: needs faiss; pip install faiss-cpu") from None
    faiss.omp_set_num_threads(torch.get_num_threads())  # of this thread alone
    return faiss


def choose_index(kind: str, count: int) -> str:
    """Return the kind of index for so many keys; a choice of auto is printed."""
    if kind == "auto":
        kind = "flat" if count <= FLAT_UP_TO else "ivfpq"
        print(f"index auto: {kind} for {count:,} keys (flat up to {FLAT_UP_TO:,}, then ivfpq; "
              "hnsw, which neither merges nor leaves memory, when asked for)")
    require(kind != "ivfpq" or count >= 1000, "index", kind, f"flat or hnsw for {count} keys, too "
            "few to train ivfpq on")
    return kind


def new_index(kind: str, width: int, count: int, sample: np.ndarray):
    """Make an empty FAISS index over squared L2 distance; ivfpq is trained on a sample of keys."""
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


def sample_keys(keys: np.ndarray, scale: Scale, most: int = 100_000) -> np.ndarray:
    """Return evenly spaced keys as an index holds them, to train one on."""
    step = max(1, math.ceil(len(keys) / most))
    return scale.unit(keys[::step])


def add_keys(index, keys: np.ndarray, scale: Scale, begin: int, end: int) -> None:
    """Add keys begin .. end - 1 to an index."""
    for start in range(begin, end, 2**14):
        block = keys[start : min(start + 2**14, end)]
        index.add(scale.unit(block))


def write_index(index, path: Path) -> None:
    """Write an index whole or not at all. Raises ValueError."""
    faiss = import_faiss()
    # Through Python: faiss itself only warns where the last block does not fit on the disk.
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))


def write_scale(keys: np.ndarray, path: Path) -> Scale:
    """Measure the scale of keys and write it."""
    scale = Scale.of(keys)
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        np.save(file, np.stack(scale))
    return scale


def build_index(folder: Path, keys_file: Path, wanted: str, count: int) -> str:
    """Index the merged keys of a file by their scale, both under temporary names -> the kind of
    index.

    Every rank adds its range to a copy of one trained index, and FAISS merges the copies. HNSW
    cannot be merged: the first rank adds all.
    """
    faiss = import_faiss()
    rank, size = rank_and_size()
    kind = choose_index(wanted, count) if rank == 0 else "ivfpq"
    keys = np.load(keys_file, mmap_mode="r", allow_pickle=False)
    trained, measured = folder / f"{INDEX}.empty", folder / f"{SCALE}.part"
    if rank == 0:
        scale = write_scale(keys, measured)
        write_index(new_index(kind, keys.shape[1], count, sample_keys(keys, scale)), trained)
    barrier()

    index = faiss.read_index(str(trained))
    scale = Scale(*np.load(measured, allow_pickle=False))
    if isinstance(index, faiss.IndexHNSW):
        add_keys(index, keys, scale, 0, count if rank == 0 else 0)
    else:
        add_keys(index, keys, scale, *share_of(count))
    if rank:
        write_index(index, shard_path(folder, INDEX, rank))
    barrier()

    if rank == 0:
        for other in range(1, size) if kind != "hnsw" else ():
            part = faiss.read_index(str(shard_path(folder, INDEX, other)))
            index.merge_from(part, index.ntotal if kind == "ivfpq" else 0)
        write_index(index, folder / f"{INDEX}.part")
        trained.unlink()
    return kind


def write_sources(job: Build) -> None:
    """Write where the documents are from whose tokens are values."""
    kept = [source for source in job.sources if source.start < job.count]
    write_json({"sources": kept}, job.folder / SOURCES)


def commit_build(job: Build, kind: str) -> None:
    """Rename what was built into place. The manifest goes first and comes last: whoever finds one
    finds the files that it describes."""
    (job.folder / MANIFEST).unlink(missing_ok=True)
    (job.folder / STATES).unlink(missing_ok=True)
    files = array_files(job.count, job.base.width, job.base.tap.tail)
    for name in (*files, INDEX, SCALE):
        with growing(job.folder / name) as path:
            os.replace(job.folder / f"{name}.part", path)
    write_sources(job)
    description = job.describe()
    manifest = description | {
        "identity": identity_hash(description), "index": kind,
        "index_sha256": file_sha(job.folder / INDEX),
        "scale_sha256": file_sha(job.folder / SCALE),
        "keys_sha256": file_sha(job.folder / KEYS),
        "values_sha256": file_sha(job.folder / VALUES),
        "settings": {}} | job.extra
    if STATES in files:
        manifest["states_sha256"] = file_sha(job.folder / STATES)
    write_json(manifest, job.folder / MANIFEST)
    for name in (*(f"{name}.*of*" for name in (*files, INDEX)), "build.*of*.json"):
        for path in job.folder.glob(name):
            path.unlink()


def what_is_built(job: Build, identity: str) -> str:
    """What is there, whole: "all" of it, "keys" without this kind of index, or "" of these keys."""
    old = read_json(job.folder / MANIFEST, "delete it and build again")
    if old.get("identity") != identity:
        return ""
    found = ""
    try:
        manifest = read_manifest(job.folder)
        open_arrays(job.folder, manifest)
        found = "keys"
        if job.index in ("auto", manifest["index"]):
            open_index(job.folder, manifest, NPROBE)
            found = "all"
    except (ValueError, FileNotFoundError) as damage:
        print(f"build: {damage}: building")
    return found


def index_again(job: Build) -> None:
    """Build the index of keys that are there. The manifest comes last: with a file of another index
    it is known as damaged, and indexed again. What was tuned with another index is not kept."""
    old = read_manifest(job.folder)
    wanted = old["index"] if job.index == "auto" else job.index
    kind = build_index(job.folder, job.folder / KEYS, wanted, job.count)
    if rank_and_size()[0]:
        return
    print(f"build: index {kind} of them")
    of_index = {"index": kind}
    for name, field in ((INDEX, "index_sha256"), (SCALE, "scale_sha256")):
        part = job.folder / f"{name}.part"
        of_index[field] = file_sha(part)
        with growing(job.folder / name) as path:
            os.replace(part, path)
    if any(old.get(field) != value for field, value in of_index.items()):
        print("build: that is another index; train and tune again")
        same = (*job.describe(), "identity", "keys_sha256", "values_sha256", "states_sha256")
        kept = {name: old[name] for name in same if name in old}
        write_json(kept | of_index | {"settings": {}} | job.extra, job.folder / MANIFEST)
    for shard in job.folder.glob(f"{INDEX}.*of*"):
        shard.unlink()


def build_datastore(job: Build) -> None:
    """Build the datastore, or its index alone, unless it is there. Of several processes each writes
    a shard."""
    identity, count, width = identity_hash(job.describe()), job.count, job.base.width
    rank, _ = rank_and_size()
    found = what_is_built(job, identity)
    barrier()  # nobody writes while another still reads
    if found:
        print(f"build: {job.folder} holds these {count:,} keys already")
        if rank == 0:  # the same text, maybe in other files now, or built before they were kept
            write_sources(job)
        if found == "keys":
            index_again(job)
            barrier()
        return
    if rank == 0:
        print(f"build: {count:,} keys of {width} ({count * width * 2 / 2**20:,.0f} MiB)")

    began = time.perf_counter()
    build_shard(job, identity)
    barrier()
    if rank == 0:
        merge_shards(job.folder, array_files(count, width, job.base.tap.tail))
    barrier()

    keyed = time.perf_counter()
    kind = build_index(job.folder, job.folder / f"{KEYS}.part", job.index, count)
    if rank == 0:
        commit_build(job, kind)
        size = (job.folder / INDEX).stat().st_size / 2**20
        print(f"build: keys {keyed - began:.0f} s, index {kind} {time.perf_counter() - keyed:.0f} "
              f"s, {size:,.0f} MiB")
    barrier()


# ══ Search: exact distances from the memory-mapped keys ══════════════════════════════════════════
class Datastore(NamedTuple):
    """Keys and values on disk, and an index over them in memory or mapped. It is only read."""

    keys: np.ndarray  # (n, D) float16, memory-mapped
    values: np.ndarray  # (n,) int32, memory-mapped: the token that followed
    index: object  # of the keys as `scale` makes them
    kind: str  # flat | ivfpq | hnsw
    scale: Scale
    rerank: int = RERANK
    most: int = 0  # a search for fewer neighbours considers as many candidates as one for so many
    states: np.ndarray | None = None  # (n, D) float16, memory-mapped, of a base with a tail

    def search(self, queries: np.ndarray, k: int, exclude: np.ndarray | None = None
               ) -> tuple[np.ndarray, np.ndarray]:
        """Find the k nearest keys of queries (Q, D) -> distances (Q, k) and ids (Q, k).

        A distance is 2 (1 - cos), from 0 to 4, of the standardised float16 keys: squared L2 of what
        the index holds. Neighbours are sorted here (an index promises no order), ties to the lowest
        id; inf and -1 stand where fewer were found. `exclude` (Q,) holds each query's own id, which
        is left out.
        """
        queries = self.scale.unit(queries)
        wanted = max(k, self.most) * (self.rerank if self.kind == "ivfpq" else 1) + 8
        if exclude is not None:
            wanted += 1
        wanted = min(wanted, len(self.keys))

        distances = np.empty((len(queries), k), dtype=np.float32)
        ids = np.empty((len(queries), k), dtype=np.int64)
        for start in range(0, len(queries), 1024):
            rows = slice(start, start + 1024)
            candidates = self.candidates(queries[rows], wanted)  # (q, c)
            own = None if exclude is None else exclude[rows]
            distances[rows], ids[rows] = self.rank(queries[rows], candidates, own, k)
        return distances, ids

    def candidates(self, queries: np.ndarray, wanted: int) -> np.ndarray:
        """Return ids (Q, c) of keys that may be the nearest, -1 where there are fewer, in any
        order."""
        faiss = import_faiss()
        if self.kind == "hnsw":
            search = faiss.SearchParametersHNSW(efSearch=max(64, 2 * wanted))
            return self.index.search(queries, wanted, params=search)[1]
        return self.index.search(queries, wanted)[1]

    def rank(self, queries: np.ndarray, candidates: np.ndarray, own: np.ndarray | None, k: int
             ) -> tuple[np.ndarray, np.ndarray]:
        """Rank candidates (q, c) of queries (q, D) by their exact distances, some queries at a time
        -> distances and ids (q, k); inf and -1 where there are fewer."""
        distances = np.full((len(queries), k), np.inf, dtype=np.float32)
        ids = np.full((len(queries), k), -1, dtype=np.int64)

        numbers = candidates.shape[1] * queries.shape[1]  # of one query
        at_once = max(1, 2**19 // numbers)  # what a processor's cache holds
        for start in range(0, len(queries), at_once):
            rows = slice(start, start + at_once)
            near = candidates[rows]
            apart = self.distances(queries[rows], near)
            if own is not None:
                apart[near == own[rows, None]] = np.inf
            order = np.lexsort((near, apart), axis=-1)[:, :k]  # (q, min(k, c))
            columns = order.shape[1]
            distances[rows, :columns] = np.take_along_axis(apart, order, 1)
            ids[rows, :columns] = np.take_along_axis(near, order, 1)

        ids[np.isinf(distances)] = -1
        return distances, ids

    def distances(self, queries: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Return the distances (q, c) of unit queries (q, D) from the keys of ids (q, c); inf for
        an id of -1."""
        at = torch.from_numpy(np.maximum(ids, 0)).view(-1)
        keys = torch.from_numpy(self.keys).index_select(0, at).float()  # (q*c, D)
        keys = keys.view(*ids.shape, -1)  # (q, c, D)
        keys.sub_(torch.from_numpy(self.scale.mean))
        keys.mul_(torch.from_numpy(self.scale.factor))
        length = torch.linalg.vector_norm(keys, dim=-1).clamp_min_(1e-12)  # (q, c)
        cosine = keys.mul_(torch.from_numpy(queries).unsqueeze(1)).sum(-1).div_(length)
        distances = cosine.mul_(-2).add_(2).clamp_min_(0).numpy()  # (q, c)
        distances[ids < 0] = np.inf
        return distances

    def exact(self, queries: np.ndarray, k: int) -> np.ndarray:
        """The ids (Q, k) of the k nearest keys of queries (Q, D) by looking at all, in any order:
        what an index is measured by."""
        queries = torch.from_numpy(self.scale.unit(queries))
        best = torch.full((len(queries), k), -math.inf)
        ids = torch.full((len(queries), k), -1, dtype=torch.int64)
        for start in range(0, len(self.keys), 2**14):
            block = torch.from_numpy(self.scale.unit(self.keys[start : start + 2**14]))
            cosine = torch.cat([best, queries @ block.T], dim=1)
            numbers = torch.arange(start, start + len(block)).expand(len(queries), -1)
            best, at = cosine.topk(k, dim=1)
            ids = torch.cat([ids, numbers], dim=1).gather(1, at)
        return ids.numpy()

    def recall(self, queries: np.ndarray, k: int) -> float:
        """The share of the k nearest keys of queries (Q, D) that a search finds."""
        found, true = self.search(queries, k)[1], self.exact(queries, k)
        hits = [len(np.intersect1d(a, b)) for a, b in zip(found, true, strict=True)]
        return float(np.mean(hits)) / k


# ══ Opening what was built ═══════════════════════════════════════════════════════════════════════
NEEDED = {
    "base": str,
    "count": int,
    "width": int,
    "vocab": int,
    "key": str,
    "index": str,
    "index_sha256": str,
    "identity": str,
    "settings": dict,
    "config": dict,
    "text_sha256": str,
    "domain": str,
    "tokenizer_sha256": str,
}


def read_manifest(folder: Path) -> dict:
    """Read the manifest of a folder. Raises FileNotFoundError where nothing was built, ValueError
    where it is not whole."""
    path = folder / MANIFEST
    manifest = read_json(path, "delete it and build again")
    if not manifest:
        raise FileNotFoundError(f"{path}: is not there; make it with python memory_decoder.py "
                                "build")
    is_whole = all(isinstance(manifest.get(name), kind) for name, kind in NEEDED.items())
    require(is_whole, "file", str(path), "a whole manifest; delete it and build again")
    return manifest


def check_version(folder: Path, manifest: dict) -> None:
    """Raise ValueError where an index is of keys that are not standardised."""
    stride = manifest.get("stride")
    require("scale_sha256" in manifest, "file", str(folder / INDEX), "of standardised keys (an "
            "older version made it of the keys as they are, and found few of the nearest); run "
            "python memory_decoder.py as that was built, with "
            f"--stride {stride}: the keys are kept")


def check_manifest(folder: Path, base: Base, manifest: dict) -> None:
    """Raise ValueError where a datastore was built by another base, or read in another way."""

    def check(name: str, same: bool, built: object, this: object) -> None:
        if not same:
            raise ValueError(f"{folder / MANIFEST}: was built with {name} {built!r}, this is "
                             f"{this!r}; name that one, or build into another folder")

    older = manifest["key"] == "final" and "final" not in manifest
    require(not older, "key", "final", f"of every token, and those in {folder} are of a window's "
            "last one, as an older version took them; build again")
    check("base", manifest.get("base_fingerprint") == base.fingerprint, manifest["base"], base.name)
    these = {"width": base.width, "vocab": base.vocab, "key": base.tap.key, "window": base.window}
    these |= {"tail": base.tap.tail} if base.tap.tail else {}
    for name, this in these.items():
        check(name, manifest.get(name) == this, manifest.get(name), this)


def map_array(path: Path, shape: tuple[int, ...], dtype: str, digest: str | None, remedy: str
              ) -> np.ndarray:
    """Map an array of keys or values; no pickle is read. Raises FileNotFoundError, or ValueError
    where it is not of the size and the sha256 that the manifest says; older ones say no sha256."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: is not there; {remedy}")
    with reading(path, remedy):
        array = np.lib.format.open_memmap(path, mode="c")  # "c": torch wants to write
    fits = array.shape == shape and array.dtype == dtype
    require(fits, "file", str(path), f"{dtype} of shape {shape}, whole, as the manifest says; "
            f"{remedy}")
    require(digest in (None, file_sha(path)), "file", str(path), "of the sha256 that the manifest "
            f"says (it is altered); {remedy}")
    return np.asarray(array)


def read_index(path: Path, kind: str, nprobe: int = NPROBE):
    """Open an index file, mapped where its kind can be. Raises ValueError."""
    faiss = import_faiss()
    mapped = {"flat": getattr(faiss, "IO_FLAG_MMAP_IFC", 0), "ivfpq": faiss.IO_FLAG_MMAP}
    with reading(path, "build again, with this version of faiss"):
        index = faiss.read_index(str(path), mapped.get(kind, 0))
    if kind == "ivfpq":
        index.nprobe = min(nprobe, index.nlist)
    return index


def read_scale(path: Path, width: int, digest: str) -> Scale:
    """Read the scale of a datastore. Raises ValueError or FileNotFoundError."""
    mean, factor = map_array(path, (2, width), "float32", digest, "build again")
    return Scale(mean, factor)


def open_index(folder: Path, manifest: dict, nprobe: int) -> tuple[object, Scale]:
    """Open the index that a manifest describes, and the scale that it holds keys by. Raises
    FileNotFoundError, or ValueError where one is corrupt or another."""
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{path}: is not there; build again")
    check_version(folder, manifest)
    require(file_sha(path) == manifest["index_sha256"], "file", str(path), "the index that was "
            "built (it is corrupt, or of another build); build again")
    index = read_index(path, manifest["index"], nprobe)
    require((index.ntotal, index.d) == (manifest["count"], manifest["width"]), "file", str(path),
            "of as many keys as the manifest says; build again")
    return index, read_scale(folder / SCALE, manifest["width"], manifest["scale_sha256"])


def open_datastore(folder: Path, manifest: dict, nprobe: int = NPROBE, rerank: int = RERANK,
                   most: int = 0) -> Datastore:
    """Map a built datastore. Raises ValueError or FileNotFoundError, one line, where a file is
    missing, of other sizes than the manifest says, or corrupt."""
    keys, values, states = open_arrays(folder, manifest)
    index, scale = open_index(folder, manifest, nprobe)
    return Datastore(
        keys=keys,
        values=values,
        index=index,
        kind=manifest["index"],
        scale=scale,
        rerank=rerank,
        most=most,
        states=states)


def open_arrays(folder: Path, manifest: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Map keys, values and states, if any. Raises as open_datastore."""
    count, remedy = manifest["count"], "build again"
    keys = map_array(folder / KEYS, (count, manifest["width"]), "float16",
                     manifest.get("keys_sha256"), remedy)
    values = map_array(folder / VALUES, (count,), "int32", manifest.get("values_sha256"), remedy)
    return keys, values, open_states(folder, manifest)


def open_states(folder: Path, manifest: dict) -> np.ndarray | None:
    """Map the states of a datastore, None where it was built without. Raises as open_datastore."""
    if not manifest.get("tail"):
        return None
    return map_array(folder / STATES, (manifest["count"], manifest["width"]), "float16",
                     manifest.get("states_sha256"), "build again")


def read_sources(folder: Path) -> list[Source]:
    """Where the documents of a datastore are from; [] for one that was built before they were kept.
    Raises ValueError."""
    path = folder / SOURCES
    kept = read_json(path, "build again").get("sources", [])
    with reading(path, "build again"):
        sources = [Source(*source) for source in kept]
        starts = [source.start for source in sources]
        if starts != sorted(starts) or not all(isinstance(start, int) for start in starts):
            raise ValueError("not in order")
    return sources


# ══ The kNN distribution ═════════════════════════════════════════════════════════════════════════
def knn_share(nearest: np.ndarray, lambda_: float, decay: float) -> np.ndarray:
    """Return what part of the prediction the neighbours get, lambda exp(-decay d), by the distance
    d of the nearest (…): a state that was never met is no reason to believe them. None where none
    was found (inf). decay 0 is kNN-LM, one share everywhere. Drozdov et al. 2022, arXiv 2210.15859,
    give each of some bins of similarity a share of its own; two numbers do as well here."""
    found = np.isfinite(nearest)
    near = np.where(found, nearest, 0)
    return np.where(found, lambda_ * np.exp(-decay * near), 0)


def knn_weights(distances: torch.Tensor, tau: float) -> torch.Tensor:
    """Weigh neighbours (…, k) by softmax(-d / tau); one that was not found (inf) weighs 0."""
    return torch.nan_to_num((-distances / tau).softmax(-1))


def knn_probabilities(distances: torch.Tensor, values: torch.Tensor, tau: float, vocab: int
                      ) -> torch.Tensor:
    """Sum the weights of neighbours, distances and values (Q, k), by value -> p_knn (Q, V)."""
    dense = distances.new_zeros(len(distances), vocab)
    return dense.scatter_add_(1, values.long(), knn_weights(distances, tau))

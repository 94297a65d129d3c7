#!/usr/bin/env python3
"""Plug a domain into a frozen language model: a kNN datastore, and a decoder that imitates it.

    python memory_decoder.py                   build, train, tune, evaluate; fills trained_models/
    python memory_decoder.py build|train|tune|evaluate    one part, on what the part before left
    python memory_decoder.py --base smollm2    a pretrained base that a package carries
    python memory_decoder.py --base google/gemma-2b --domain ibunescu/qa_legal_dataset_train \\
        --text_template "{Title} {Question} {Answer}"
    torchrun --standalone --nproc_per_node 2 memory_decoder.py build       the datastore, in shards
    python memory_decoder.py --help            every Config field, its default and its comment

Read downward; each section uses only what stands above it. The base and the datastore are in
datastore.py, the decoder, mixing and generation in memory_lm.py.
kNN-LM is Khandelwal et al. 2020, arXiv 1911.00172; the memory decoder is Cao et al. 2025, arXiv
2508.09874. Position i of a text is a query for its token i + 1; one key is stored for each.
Letters: B rows, T tokens, D width of a key, C width of a decoder, V vocabulary, Q queries,
k neighbours, M entries of a sparse target, K and U settings of k and tau, A of alpha, m positions
of a group of windows, n positions of a stream.
"""

import contextlib
import copy
import dataclasses
import math
import os
import platform
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

if __name__ == "__main__" and not hasattr(sys, "ps1"):  # until main listens: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# isort: off
import dnc_gpt2  # before torch: it says how threads wait
# isort: on
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# isort: off
from dnc_gpt2 import (
    # types of Config fields, and checks
    Bound,
    Count,
    Positive,
    Seed,
    Whole,
    check_fields,
    require,
    require_field,
    # command
    Diverged,
    StopSignal,
    print_any_character,
    read_config,
    run_command,
    split_command,
    # files, and finding or training a base
    check_folder,
    file_sha,
    growing,
    locked,
    newest_baselines,
    reading,
    save_tensors,
    train_baseline,
    write_json,
    # what a reader is told
    PALETTE,
    cell,
    dark_figure,
    device_name,
    plain,
    print_banner,
    print_heading,
    rate_share,
    run_facts,
    student_interval,
    # data and model
    asking_hub,
    count_parameters,
    embedded_documents,
    folder_texts,
    hub_reachable,
    hub_splits,
    line_of,
    pieces_of,
    tokenize,
)
# isort: on
from datastore import (
    MANIFEST,
    NPROBE,
    RERANK,
    Base,
    Build,
    Datastore,
    Source,
    Window,
    build_datastore,
    check_manifest,
    identity_hash,
    import_faiss,
    is_own,
    knn_share,
    knn_weights,
    load_base,
    map_array,
    most_used,
    open_datastore,
    open_part,
    plan_windows,
    rank_and_size,
    read_group,
    read_keys,
    read_manifest,
    sha,
    used,
)
from memory_lm import (
    DECODER_FILE,
    SEARCHED_WITH,
    Conversation,
    Decoder,
    MemoryLM,
    TailDecoder,
    decoder_of,
    distribution,
    inputs_of,
    load_trained,
    made_for,
    make_tail,
    mix,
)
from packaged import INSTALL, packaged_file
from packaged import NAME as PACKAGED

COMMANDS = ("build", "train", "tune", "evaluate")
# What is trained, and the file of each; that of decoder_kind is memory_decoder.pt.
ARM_FILES = {
    "tail": "decoder_tail.pt",
    "hidden": "decoder_hidden.pt",
    "tokens": "decoder_tokens.pt",
    "text": "decoder_text.pt",
    "distilled": "decoder_distilled.pt",
    "finetuned": "base_finetuned.pt",
    "lora": "base_lora.pt",
}
# Arms that are the base itself, trained on: the field of their rates, and what they are called.
TUNED = {"finetuned": ("finetune_lrs", "fine-tuned base"), "lora": ("lora_lrs", "base with LoRA")}
DISTANCE = "cosine of standardised keys"  # by which neighbours are found that decoders imitate
WindowTokens = Annotated[int, Bound("8 or more", lambda x: x >= 8)]


# ══ Config ═══════════════════════════════════════════════════════════════════════════════════════
@dataclasses.dataclass(frozen=True)
class Config:
    """Every constant of a run. Edit here, or override as `--name value`."""

    # what
    base: str = "auto"  # auto (yours, SmolLM2, or trained) | smollm2 | hub name | folder | .pt
    domain: str = "auto"  # auto (the embedded corpus) | hub data set | folder of .txt files
    text_template: str = ""  # one text of a hub data set's row, as "{Question} {Answer}"
    model_dir: str = "trained_models/"  # what is built and trained
    save_dir: str = "checkpoints/"  # where base auto looks for GPT2_Baseline_*, and trains one
    plot_dir: str = "plots/"  # memory_decoder.png
    seed: Seed = 0  # weights and order of the decoders' training
    # reading
    window: WindowTokens = 1024  # tokens that the base sees at once; at most its positions
    stride: Whole = 0  # new tokens of a window, 0 = 3/4 of it; the rest was read before
    batch_windows: Count = 4  # windows of one forward pass
    # datastore
    key: Literal["feed_forward", "final"] = "feed_forward"  # its last input, or the final state
    max_keys: Whole = 200_000  # first so many positions of the domain, 0 = all
    index: Literal["auto", "flat", "ivfpq", "hnsw"] = "auto"  # auto: by size
    nprobe: Count = NPROBE  # lists of ivfpq that a search visits
    rerank: Count = RERANK  # candidates of ivfpq a neighbour; the distances of all are then exact
    knn_k: Count = 512  # most neighbours; tuned among it, its 4th and its 16th part
    # decoder
    decoder_kind: Literal["auto", "hidden", "tokens", "tail"] = "auto"  # yours: hidden; else tail
    tail_blocks: Count = 4  # of kind tail: at most so many last blocks of the base, trained on
    decoder_dim: Count = 256  # width
    decoder_layers: Count = 6  # transformer blocks
    decoder_heads: Count = 32  # attention heads; divides decoder_dim
    decoder_reach: Count = 256  # tokens of a training row; all but a tail attend to no more
    decoder_lr: Positive = 4e-3  # peak rate of AdamW
    num_epochs: Count = 1  # passes over the training positions
    train_tokens: Whole = 100_000  # training positions of decoders and fine-tuning, 0 = all keys
    batch_tokens: Count = 1024  # of a training step; small: docs/lab-notes.md, 12
    beta: float | Literal["auto"] = "auto"  # share of KL(p_knn || p_dec); auto: as tuned for kNN-LM
    target_width: Count = 64  # M, heaviest tokens of a kNN target that are kept
    arms: str = "auto"  # beside decoder_kind; auto: text, beside a base of yours 3 more (settled)
    finetune_lrs: str = "auto"  # of the fine-tuned base and a tail, such as 1e-4,3e-4: best is kept
    lora_lrs: str = "1e-3"  # likewise of arm lora: adapters on every projection of the base
    lora_rank: Count = 16  # of those adapters
    # mixing
    mixing: Literal["probability", "logits"] = "probability"  # of base and decoder
    alpha: float | Literal["auto"] = "auto"  # share of the decoder, from 0 to 1; auto: tuned
    # evaluation
    tune_tokens: Whole = 20_000  # the first of validation, 0 = all
    eval_tokens: Whole = 0  # of test, 0 = all
    latency_tokens: Whole = 48  # generated in one timed turn, 0 = no timing
    latency_rounds: Count = 5  # turns of each system; the median counts

    @property
    def arm_list(self) -> list[str]:
        """The arms that are trained, decoder_kind first, each once."""
        names = self.arms.replace(" ", "").split(",")
        return list(dict.fromkeys([self.decoder_kind, *filter(None, names)]))

    @property
    def tail(self) -> int:
        """The last blocks of the base that a decoder of kind tail is made of; 0 = no such one."""
        return self.tail_blocks if "tail" in self.arm_list else 0

    @property
    def folder(self) -> Path:
        """model_dir as a path."""
        return Path(self.model_dir)

    def rates(self, field: str = "finetune_lrs") -> list[float]:
        """The learning rates that a field holds. Raises ValueError where one is no number."""
        return [float(rate) for rate in getattr(self, field).split(",")]

    def __post_init__(self) -> None:
        check_fields(self)
        heads = self.decoder_heads
        for name in ("base", "domain", "model_dir"):
            require_field(self, name, getattr(self, name).strip() != "", "named")
        require_field(self, "alpha", self.alpha == "auto" or 0 <= self.alpha <= 1,
                      "auto, or from 0 to 1")
        require_field(self, "beta", self.beta == "auto" or 0 <= self.beta <= 1,
                      "auto, or from 0 to 1")
        require_field(self, "stride", self.stride <= self.window,
                      f"at most window ({self.window})")
        require_field(self, "decoder_dim", self.decoder_dim % heads == 0,
                      f"divisible by decoder_heads ({heads})")
        arms = set(self.arm_list) - {"auto"}
        require_field(self, "arms", arms <= ARM_FILES.keys(), "auto, or of " + ", ".join(ARM_FILES))
        require_field(self, "finetune_lrs", self.finetune_lrs == "auto" or
                      are_rates(self.finetune_lrs), "auto, or rates above 0, separated by commas")
        require_field(self, "lora_lrs", are_rates(self.lora_lrs),
                      "rates above 0, separated by commas")
        if "lora" in arms:
            import_peft()


def are_rates(text: str) -> bool:
    """Whether a text is learning rates, separated by commas."""
    try:
        return all(0 < float(rate) < math.inf for rate in text.split(","))
    except ValueError:
        return False


def import_peft():
    """Import peft. Only arm lora needs it."""
    try:
        import peft
    except ImportError:
        raise ValueError("arms lora: needs peft; pip install peft") from None
    return peft


def settled(config: Config, base: str) -> Config:
    """The Config with what auto means for a base: one that dnc_gpt2.py trained is small enough that
    everything can be trained beside it; of a pretrained one the last blocks are trained on."""
    own = is_own(base)
    auto = {"decoder_kind": "tail", "arms": "text", "finetune_lrs": "3e-4"}
    if own:
        auto = {"decoder_kind": "hidden", "arms": "tokens,text,distilled,finetuned",
                "finetune_lrs": "1e-4,3e-4"}
    chosen = {name: value for name, value in auto.items() if getattr(config, name) == "auto"}
    return dataclasses.replace(config, **chosen)


# ══ Base and domain: three splits of one token stream ════════════════════════════════════════════
HUB_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


def find_base(config: Config) -> str:
    """Choose a base, said in one line: the newest finished baseline of save_dir; SmolLM2 from the
    hub, or from the package that carries it; a small one that is trained now. Raises ValueError, or
    StopSignal where training is stopped: it goes on where it was."""
    paths = newest_baselines(config.save_dir)
    if paths:
        print(f"base auto: {paths[0]}, the newest that you trained; --base smollm2 is a pretrained "
              "one", flush=True)
        return str(paths[0])
    if hub_reachable():
        print(f"base auto: {HUB_BASE}, from the hub", flush=True)
        return HUB_BASE
    if packaged_file():
        print(f"base auto: {PACKAGED}, from its package; the hub does not answer", flush=True)
        return PACKAGED
    require(rank_and_size()[1] == 1, "base", "auto", "a trained one under torchrun; train it "
            f"first, into {config.save_dir}")
    print(f"base auto: training the small one of dnc_gpt2.py; for a pretrained one: {INSTALL}",
          flush=True)
    return str(train_baseline(batch_size=4, seq_len=128, save_dir=config.save_dir,
                              plot_dir=config.folder / "base"))


class Document(NamedTuple):
    """A text, and where a reader finds it."""

    text: object  # str, or a TextFile where it is large
    name: str  # a file below the domain's folder, a topic, a row
    line: int = 1  # of that file, which the text begins with; 0 = the file holds more


def distinct(documents: list[Document]) -> list[Document]:
    """Return the documents that hold more than white space, each text once."""
    first = {document.text: document for document in reversed(documents)}
    return [document for document in documents
            if document.text.strip() and first[document.text] is document]


def paragraphs_of(document: Document) -> list[Document]:
    """Cut a document at its empty lines."""
    parts, at, line = [], 0, document.line
    for gap in [*re.finditer(r"\n\s*\n", document.text), None]:
        end = gap.start() if gap else len(document.text)
        parts.append(Document(document.text[at:end] + "\n\n", document.name, line))
        at_next = gap.end() if gap else end
        line += document.text.count("\n", at, at_next)
        at = at_next
    return parts


def split_documents(documents: list[Document], field: str, value: str) -> dict[str, list[Document]]:
    """Split documents 90 : 5 : 5, each text once. Where there are few, their paragraphs are the
    documents. Raises ValueError, naming field and value, where even these are few."""
    documents = distinct(documents)
    if len(documents) < 20:
        print(f"{field}: {len(documents)} texts are few; their paragraphs are split 90 : 5 : 5 "
              "instead")
        documents = distinct([part for whole in documents for part in paragraphs_of(whole)])
    require(len(documents) >= 20, field, value, "20 texts or paragraphs, to be split 90 : 5 : 5 "
            f"({len(documents)} found)")

    split_of = {18: "valid", 19: "test"}
    splits: dict[str, list[Document]] = {"train": [], "valid": [], "test": []}
    for i, document in enumerate(documents):
        split = split_of.get(i % 20, "train")
        splits[split].append(document)
    return splits


def row_documents(rows, template: str, domain: str) -> list[Document]:
    """Write each row of a hub data set through a template, by default its column text. Raises
    ValueError naming the columns that there are."""
    template = template or "{text}"
    documents = []
    try:
        for number, row in enumerate(rows):
            filled = {name: "" if value is None else value for name, value in row.items()}
            text = template.format(**filled)
            if text.strip():
                documents.append(Document(line_of(text), f"row {number:,}"))
    except (KeyError, IndexError, ValueError, AttributeError, TypeError):
        columns = rows.column_names
        raise ValueError(f"text_template = {template!r}: must name columns of {domain}: "
                         f"{', '.join(columns)}, as in {{{columns[0]}}}") from None
    return documents


def hub_domain(domain: str, template: str) -> dict[str, list[Document]]:
    """Read a hub data set through a template; its own splits where it has all three. Raises
    ValueError."""
    with asking_hub("domain", domain, "a folder of text files"):
        rows_of = hub_splits(domain)
    names = {"train": "train", "valid": "validation", "test": "test"}
    if set(names.values()) <= rows_of.keys():
        return {ours: row_documents(rows_of[name], template, domain)
                for ours, name in names.items()}
    documents = []
    for rows in rows_of.values():
        documents += row_documents(rows, template, domain)
    return split_documents(documents, "domain", domain)


def folder_domain(folder: str) -> dict[str, list[Document]]:
    """Read train.txt, valid.txt and test.txt, or else any .txt files, split. Raises ValueError."""
    require(Path(folder).is_dir(), "domain", folder, "a folder of .txt files, a hub data set, or "
            "auto")
    if all((Path(folder) / f"{split}.txt").is_file() for split in ("train", "valid", "test")):
        return {split: [Document(text, f"{split}.txt") for text in texts]
                for split, texts in folder_texts(folder, "domain").items()}
    documents = []
    for path in sorted(Path(folder).rglob("*.txt")):
        if not path.is_file():  # a pipe or a device, which may never end
            print(f"domain: {path.name} is no regular file; left out")
            continue
        try:
            text = path.read_text(encoding="utf-8")
            documents.append(Document(text, path.relative_to(folder).as_posix()))
        except UnicodeDecodeError as error:
            raise ValueError(f"domain = {folder!r}: {path.name} is not UTF-8 (at byte "
                             f"{error.start}); convert it, for example with iconv") from None
    some = any(document.text.strip() for document in documents)
    require(some, "domain", folder, "a folder with text in .txt files (there is none)")
    return split_documents(documents, "domain", folder)


class Domain(NamedTuple):
    """Three token streams (int64, 1-D) and what they are."""

    name: str
    train: torch.Tensor
    valid: torch.Tensor
    test: torch.Tensor
    fingerprint: str  # sha256 of the training tokens
    sources: list[Source]  # of the training documents, in order


def domain_documents(config: Config) -> tuple[str, dict[str, list[Document]]]:
    """Return the name and the three splits of the domain that Config names. Raises ValueError."""
    name = config.domain
    if name == "auto":
        splits = {split: [Document(text, source, line=0) for source, text in named]
                  for split, named in embedded_documents().items()}
        return f"Python {platform.python_version()} documentation", splits
    if Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        return Path(name).resolve().name, folder_domain(name)
    return name, hub_domain(name, config.text_template)


def encode_documents(base: Base, documents: list[Document]) -> tuple[torch.Tensor, list[Source]]:
    """Tokenize documents as the base reads them: by line, as dnc_gpt2.py trained it, or each with
    an end-of-text token behind it -> one stream (n,), and where in it each begins."""
    backend = base.tokenizer.backend_tokenizer
    if base.own:
        streams = [tokenize(backend, [document.text]) for document in documents]
    else:
        end = backend.token_to_id("<|endoftext|>")  # a model of dialogues ends its turns otherwise
        end = base.tokenizer.eos_token_id if end is None else end
        ends = [] if end is None else [end]
        whole = ["".join(pieces_of(document.text)) for document in documents]
        encodings = backend.encode_batch(whole, add_special_tokens=False)
        streams = [torch.tensor([*encoding.ids, *ends]) for encoding in encodings]
    sources, at = [], 0
    for document, stream in zip(documents, streams, strict=True):
        sources.append(Source(at, document.name, document.line))
        at += len(stream)
    return torch.cat(streams), sources


def load_domain(config: Config, base: Base) -> Domain:
    """Read and tokenize the domain. Raises ValueError where it cannot be had or is too short."""
    name, splits = domain_documents(config)
    streams, sources = {}, {}
    for split, documents in splits.items():
        stream, sources[split] = encode_documents(base, documents)
        require(len(stream) > 8, "domain", config.domain, f"longer: {split} has {len(stream)} "
                "tokens")
        streams[split] = stream.long()
    if config.max_keys > 0:
        streams["train"] = streams["train"][: config.max_keys + 1]
    digest = sha(streams["train"].numpy().tobytes())
    return Domain(name, **streams, fingerprint=digest, sources=sources["train"])


# ══ Build ════════════════════════════════════════════════════════════════════════════════════════
def config_stride(config: Config, base: Base) -> int:
    """Return the tokens between two windows of a base."""
    stride = config.stride or max(1, 3 * base.window // 4)
    return min(stride, base.window)


# What a datastore is described by, and the fields that it depends on.
FIELDS_OF = {
    "base_fingerprint": ("base",),
    "text_sha256": ("domain", "text_template", "max_keys"),
    "key": ("key",),
    "window": ("window",),
    "stride": ("stride",),
    "batch_windows": ("batch_windows",),
    "tail": ("decoder_kind", "arms", "tail_blocks"),
}


def changed_field(config: Config, manifest: dict, described: dict) -> tuple[str, object, object]:
    """The field in which this run differs from a whole datastore, its value there and here; both
    are the same where only what it names has changed."""
    said = ("base", "stride")  # as they came out, where auto or 0 was given
    given = manifest["config"] | {name: manifest.get(name) for name in said}
    asked = dataclasses.asdict(config) | {name: described[name] for name in said}
    if manifest["domain"] == described["domain"]:  # of a folder, however its path is written
        given["domain"] = asked["domain"]
    known = (*FIELDS_OF, None)
    name = next(name for name in known if name is None or manifest.get(name) != described.get(name))
    fields = FIELDS_OF.get(name, ("base",))
    field = next((field for field in fields if given.get(field) != asked[field]), fields[0])
    return field, given.get(field), asked[field]


def check_not_replaced(config: Config, job: Build) -> None:
    """Raise ValueError where model_dir holds a whole datastore of something else: hours of work,
    and what was trained on it would no longer fit."""
    try:
        manifest = read_manifest(config.folder)
    except (FileNotFoundError, ValueError):  # nothing is there, or nothing whole
        return
    described = job.describe()
    older = manifest["key"] == "final" and "final" not in manifest  # which can only be replaced
    if manifest["identity"] == identity_hash(described) or older:
        return
    field, old, new = changed_field(config, manifest, described)
    what = f"was built with {field} = {old!r}, this run has {new!r}; set --{field} {old}, or"
    if old == new:
        what = f"was built when {field} {old!r} held something else; bring that back, or name"
    raise ValueError(f"{config.folder / MANIFEST}: {what} another --model_dir, or delete that "
                     "folder: it holds a whole datastore")


def build(config: Config, base: Base, domain: Domain) -> None:
    """Build the datastore of the domain's training text. Raises ValueError, also where there is one
    of something else."""
    count = len(domain.train) - 1
    require(config.knn_k < count, "knn_k", config.knn_k, f"below the keys of the datastore "
            f"({count:,})")
    job = Build(
        folder=config.folder,
        base=base,
        stream=domain.train,
        domain=domain.name,
        text_sha256=domain.fingerprint,
        stride=config_stride(config, base),
        batch_windows=config.batch_windows,
        index=config.index,
        sources=domain.sources,
        extra={"about": run_facts(device_name(base.device)),
               "config": dataclasses.asdict(config)})
    check_not_replaced(config, job)
    build_datastore(job)


def open_built(config: Config, base: Base, domain: Domain) -> tuple[dict, Datastore]:
    """Return the manifest of model_dir and the open datastore. Raises ValueError where they belong
    to another base or domain, or FileNotFoundError where nothing was built."""
    manifest = read_manifest(config.folder)
    require(manifest["text_sha256"] == domain.fingerprint, "domain", config.domain, "the text of "
            f"the datastore ({manifest['domain']}, {manifest['count']:,} keys); name it, with its "
            "--max_keys, or build into another --model_dir")
    check_manifest(config.folder, base, manifest)
    require(config.knn_k < manifest["count"], "knn_k", config.knn_k, "below the keys of the "
            f"datastore ({manifest['count']:,})")
    store = open_datastore(config.folder, manifest, config.nprobe, config.rerank, config.knn_k)
    return manifest, store


def save_manifest(config: Config, manifest: dict) -> None:
    """Write the manifest of model_dir, whole or not at all."""
    write_json(manifest, config.folder / MANIFEST)


# ══ Scoring a stream: every system on the same windows, every position once ══════════════════════
class Systems(NamedTuple):
    """What is compared with the base, loaded."""

    decoders: dict[str, Decoder] = {}  # by arm
    bases: dict[str, Base] = {}  # the base trained on, by arm
    store: Datastore | None = None
    trained_with: dict[str, dict] = {}  # by arm, as its file says


class Grid(NamedTuple):
    """The settings that are scored in one pass."""

    taus: list[float] = []  # U
    ks: list[int] = []  # K
    alphas: list[float] = []  # A


class Scores(NamedTuple):
    """What each system gives to the token that really followed each of n positions."""

    log_p: dict[str, np.ndarray]  # bases: (n,) log-probability
    mixed: dict[str, np.ndarray]  # decoders: (A, n) log-probability of base + decoder by alpha
    knn: dict[str, np.ndarray]  # what bases look up: (K, U, n) probability under p_knn, k and tau
    near: dict[str, np.ndarray]  # bases: (n,) distance of the nearest key


def first_tokens(stream: torch.Tensor, limit: int) -> torch.Tensor:
    """The tokens of a stream that are read where the first so many are scored, 0 = all but one."""
    return stream[: limit + 1 if limit else None]


def perplexity(log_p: np.ndarray) -> float:
    """Return the perplexity of log-probabilities (n,)."""
    return dnc_gpt2.perplexity(-float(np.mean(log_p, dtype=np.float64)))


def knn_columns(store: Datastore, queries: np.ndarray, targets: np.ndarray, grid: Grid
                ) -> tuple[np.ndarray, np.ndarray]:
    """Return p_knn of the targets (Q,) of queries (Q, D) for every k and tau (K, U, Q), and the
    distance of the nearest key (Q,)."""
    distances, ids = store.search(queries, max(grid.ks))
    hit = (store.values[np.maximum(ids, 0)] == targets[:, None]) & (ids >= 0)
    hit = torch.from_numpy(hit)  # (Q, k)
    near = torch.from_numpy(distances)  # (Q, k)
    columns = []
    for k in grid.ks:
        weights = [knn_weights(near[:, :k], tau) for tau in grid.taus]
        columns.append([(w * hit[:, :k]).sum(1).numpy() for w in weights])
    return np.array(columns), distances[:, 0]


def taken(log_p: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Take from a log-distribution (m, V) the tokens at (m, 1) -> (m,)."""
    return log_p.gather(1, at)[:, 0]


def mixed_columns(log_base: torch.Tensor, log_memory: torch.Tensor, at: torch.Tensor,
                  alphas: list[float], mixing: str) -> np.ndarray:
    """Return the mixture of two log-distributions (m, V) at the tokens (m, 1), by alpha (A, m)."""
    if mixing == "logits":  # is normalised over the whole distribution
        columns = [taken(mix(log_base, log_memory, alpha, "logits"), at) for alpha in alphas]
    else:
        base = taken(log_base, at)
        memory = taken(log_memory, at)
        columns = [mix(base, memory, alpha) for alpha in alphas]
    return torch.stack(columns).cpu().numpy()


def decoder_log_p(decoder: nn.Module, inputs: torch.Tensor, ids: torch.Tensor,
                  group: list[Window]) -> torch.Tensor:
    """Return the log-distributions (m, V) of a decoder at the positions that a group is read for,
    from what the base made of ids (B, T), maybe behind a prefix."""
    out = decoder(inputs[:, -ids.shape[1] :], ids, kept=most_used(group))
    return used(out, group).log_softmax(-1)


def look_up(store: Datastore | None, queries: dict[str, np.ndarray], targets: np.ndarray,
            grid: Grid) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return what the queries (m, D) of every base find of the targets (m,), as Scores has it;
    nothing without a datastore."""
    knn, near = {}, {}
    if store is not None:
        for arm, of_base in queries.items():
            knn[arm], near[arm] = knn_columns(store, of_base, targets, grid)
    return knn, near


def score_group(config: Config, base: Base, stream: torch.Tensor, group: list[Window],
                systems: Systems, grid: Grid) -> Scores:
    """Score the positions that one group of windows is read for."""
    ids, keys, logits = read_group(base, stream, group)
    states = base.states
    targets = stream[group[0].first + 1 : group[-1].end + 1]  # (m,)
    at = targets.to(base.device).unsqueeze(1)  # (m, 1)
    log_base = logits.log_softmax(-1)  # (m, V)
    log_p = {"base": taken(log_base, at).cpu().numpy()}

    mixed = {}
    for arm, decoder in systems.decoders.items():
        inputs = inputs_of(decoder, keys, states)
        log_memory = decoder_log_p(decoder, inputs, ids.to(base.device), group)
        mixed[arm] = mixed_columns(log_base, log_memory, at, grid.alphas, config.mixing)

    looked_up = {"base": keys}
    for arm, tuned in systems.bases.items():
        _, looked_up[arm], logits = read_group(tuned, stream, group)
        log_tuned = logits.log_softmax(-1)  # (m, V)
        log_p[arm] = taken(log_tuned, at).cpu().numpy()

    queries = {arm: used(keys, group).cpu().numpy() for arm, keys in looked_up.items()}
    return Scores(log_p, mixed, *look_up(systems.store, queries, targets.numpy(), grid))


@torch.no_grad()
def score(config: Config, base: Base, stream: torch.Tensor, limit: int, systems: Systems,
          grid: Grid, label: str = "score") -> Scores:
    """Score every token of a stream but the first (of the first `limit` + 1, 0 = all), once."""
    from tqdm import tqdm

    stream = first_tokens(stream, limit)
    groups = plan_windows(len(stream) - 1, base.window, config_stride(config, base),
                          config.batch_windows)
    parts = [score_group(config, base, stream, group, systems, grid)
             for group in tqdm(groups, desc=label, unit="batch")]

    def joined(field: str) -> dict[str, np.ndarray]:
        """Join the parts of every system along the positions."""
        columns = [getattr(part, field) for part in parts]
        return {name: np.concatenate([column[name] for column in columns], axis=-1)
                for name in columns[0]}

    return Scores(*map(joined, Scores._fields))


def add_knn(log_p: np.ndarray, p_knn: np.ndarray, near: np.ndarray, lambda_: float, decay: float
            ) -> np.ndarray:
    """Return log((1 - share) p + share p_knn) (n,), share = knn_share(near, lambda, decay)."""
    if lambda_ == 0:
        return log_p
    share = knn_share(near.astype(np.float64), lambda_, decay)
    p = np.exp(log_p.astype(np.float64))
    return np.log((1 - share) * p + share * p_knn)


# ══ Tuning of the kNN distribution, on validation ════════════════════════════════════════════════
SHARES = tuple(i / 20 for i in range(20))  # of lambda and alpha: 0, 0.05 … 0.95
DECAYS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the share; distances are from 0 to 4
TAUS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)  # as parts of the mean distance of a neighbour


def knn_grid(store: Datastore, most: int) -> Grid:
    """Choose the temperatures and numbers of neighbours that are tried, at most so many."""
    step = max(1, len(store.keys) // 256)
    sample = np.arange(0, len(store.keys), step)
    distances, _ = store.search(store.keys[sample], most, exclude=sample)
    scale = float(distances[np.isfinite(distances)].mean())
    taus = [float(f"{part * scale:.3g}") for part in TAUS]
    ks = {max(1, most // part) for part in (1, 4, 16)}
    return Grid(taus=taus, ks=sorted(ks))


def best_shares(log_p: np.ndarray, p_knn: np.ndarray, near: np.ndarray) -> np.ndarray:
    """Return the perplexity of log p (n,) and p_knn (n,) mixed, by decay and lambda
    (decays, shares)."""
    surface = np.empty((len(DECAYS), len(SHARES)))
    for row, decay in enumerate(DECAYS):
        for column, lambda_ in enumerate(SHARES):
            surface[row, column] = perplexity(add_knn(log_p, p_knn, near, lambda_, decay))
    return surface


def knn_surface(scores: Scores) -> np.ndarray:
    """Return the perplexity of base + kNN by k, tau, decay and lambda (K, U, decays, shares)."""
    log_base = scores.log_p["base"]
    near = scores.near["base"]

    surface = []
    for by_tau in scores.knn["base"]:
        surface.append([best_shares(log_base, p_knn, near) for p_knn in by_tau])
    return np.array(surface)


def print_surface(surface: np.ndarray, grid: Grid, settings: dict, tokens: int) -> None:
    """Print the perplexities (K, U, decays, shares) at the k and decay that were chosen, the
    settings, and what one share everywhere would have had."""
    at_decay = surface[:, :, DECAYS.index(settings["decay"])]  # (K, U, shares)
    chosen = at_decay[grid.ks.index(settings["k"])]  # (U, shares)
    print(f"\n  kNN-LM, validation perplexity ({tokens:,} tokens); base alone "
          f"{chosen[0, 0]:,.2f}")
    taus = "".join(f"{tau:>9g}" for tau in grid.taus)
    print(f"  k {settings['k']}{taus}  tau")
    for share, by_tau in list(zip(SHARES, chosen.T, strict=True))[1::2]:
        values = "".join(f"{ppl:>9,.2f}" for ppl in by_tau)
        print(f"  λ {share:.2f}{values}")

    lowest = surface.min(axis=(1, 2, 3))  # (K,)
    by_k = [f"{k}: {ppl:,.2f}" for k, ppl in zip(grid.ks, lowest, strict=True)]
    print(f"  chosen: lambda {settings['lambda']}, decay {settings['decay']:g}, tau "
          f"{settings['tau']:g}, k {settings['k']}: {surface.min():,.2f} (best by k: "
          f"{', '.join(by_k)}; best with one share everywhere: {surface[:, :, 0].min():,.2f})\n")


def valid_sha(domain: Domain, limit: int) -> str:
    """The sha256 of what is read of validation where so many tokens are scored, 0 = all."""
    return sha(first_tokens(domain.valid, limit).numpy().tobytes())


@torch.no_grad()
def measure_recall(config: Config, base: Base, domain: Domain, store: Datastore) -> float:
    """Return, and print, how many of the nearest keys the search finds, of at most 256 tokens of
    validation in four places."""
    stream = first_tokens(domain.valid, config.tune_tokens)
    length = min(256, base.window, len(stream) - 1)
    starts = np.linspace(0, len(stream) - 1 - length, 4).astype(int)
    places = [Window(start, start, start + length) for start in starts.tolist()]
    keys, _ = read_keys(base, stream, places)
    step = math.ceil(len(keys) / 256)
    queries = keys[::step].cpu().numpy()

    recall = store.recall(queries, config.knn_k)
    advice = ""
    if recall < 0.9:
        search = "raise --nprobe or --rerank, or " if store.kind == "ivfpq" else ""
        advice = f"; {search}build with --index flat"
    print(f"search ({store.kind}): finds {recall:.1%} of the {config.knn_k} nearest keys{advice}",
          flush=True)
    return recall


def tune_knn(config: Config, base: Base, domain: Domain, store: Datastore, manifest: dict) -> None:
    """Choose lambda, decay, tau and k by validation perplexity of base + kNN; into the manifest,
    with the surface at that decay. What was tuned on the same datastore, text and grid stays."""
    text = valid_sha(domain, config.tune_tokens)
    stride = config_stride(config, base)
    tuned = sha(manifest["identity"], manifest["index_sha256"], config.knn_k, config.tune_tokens,
                config.rerank, config.nprobe, stride, text, DECAYS)
    if manifest["settings"].get("tuned") == tuned:
        return
    recall = measure_recall(config, base, domain, store)
    grid = knn_grid(store, config.knn_k)
    scores = score(config, base, domain.valid, config.tune_tokens, Systems(store=store), grid,
                   label="kNN on validation")
    surface = knn_surface(scores)
    i, j, r, m = np.unravel_index(surface.argmin(), surface.shape)
    settings = {"tuned": tuned, "lambda": SHARES[m], "decay": DECAYS[r], "tau": grid.taus[j],
                "k": grid.ks[i], "stride": stride, "one_share": float(surface[:, :, 0].min()),
                "recall": recall}
    settings |= {name: getattr(config, name) for name in SEARCHED_WITH}
    print_surface(surface, grid, settings, tokens=len(scores.log_p["base"]))
    manifest["settings"] = settings
    manifest["tuning"] = {"taus": grid.taus, "ks": grid.ks, "lambdas": list(SHARES),
                          "surface": surface[:, :, r].tolist()}
    save_manifest(config, manifest)


# ══ Targets: the kNN distribution of every training position, on disk ════════════════════════════
def sparse_targets(distances: torch.Tensor, values: torch.Tensor, tau: float, width: int
                   ) -> tuple[torch.Tensor, torch.Tensor]:
    """Return p_knn as its `width` heaviest tokens (Q, M) and their probabilities (Q, M),
    renormalised; probability 0 fills up. Exact where neighbours, distances and values (Q, k), have
    at most `width` different values."""
    weights = knn_weights(distances, tau)  # (Q, k)
    values, order = values.long().sort(1)
    is_new = F.pad(values[:, 1:] != values[:, :-1], (1, 0), value=False)
    place = is_new.cumsum(1)  # (Q, k): which of the different values
    sums = torch.zeros_like(weights).scatter_add_(1, place, weights.gather(1, order))
    tokens = torch.zeros_like(values).scatter_(1, place, values)
    top = sums.topk(min(width, sums.shape[1]), dim=1)
    return tokens.gather(1, top.indices), normalised(top.values)


def normalised(weights: torch.Tensor) -> torch.Tensor:
    """Divide rows (Q, M) by their sums; a row of zeros stays."""
    return weights / weights.sum(1, keepdim=True).clamp_min(1e-30)


def sparse_kl(tokens: torch.Tensor, p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Return KL(p || q) (Q,) of sparse targets, tokens and p (Q, M), against log q (Q, V)."""
    return (torch.xlogy(p, p) - p * log_q.gather(1, tokens)).sum(1)


class Targets(NamedTuple):
    """The kNN distribution of the first positions, each found without itself, mapped from disk."""

    tokens: np.ndarray  # (count, M) int32, the heaviest
    weights: np.ndarray  # (count, M) float16, their probabilities
    near: np.ndarray  # (count,) float32, distance of the nearest key

    @staticmethod
    def files(count: int, width: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """The file of each -> shape and dtype."""
        return {
            "targets_tokens.npy": ((count, width), "int32"),
            "targets_weights.npy": ((count, width), "float16"),
            "targets_near.npy": ((count,), "float32"),
        }


def compute_targets(store: Datastore, settings: dict, targets: Targets) -> None:
    """Fill targets."""
    from tqdm import tqdm

    count, width = targets.tokens.shape
    with tqdm(total=count, desc="targets", unit="key") as bar:
        for start in range(0, count, 1024):
            own = np.arange(start, min(start + 1024, count))
            distances, ids = store.search(store.keys[own], settings["k"], exclude=own)
            values = torch.from_numpy(store.values[np.maximum(ids, 0)])
            heaviest, p = sparse_targets(torch.from_numpy(distances), values, settings["tau"],
                                         width)
            targets.tokens[own] = heaviest.numpy()
            targets.weights[own] = p.numpy()
            targets.near[own] = distances[:, 0]
            bar.update(len(own))


def write_targets(config: Config, store: Datastore, manifest: dict, count: int) -> Targets:
    """Return the sparse kNN targets of the first `count` keys. They are made once for a tau and
    k."""
    settings = manifest["settings"]
    width = min(config.target_width, settings["k"])
    made = sha(manifest["identity"], manifest["index_sha256"], settings["tau"], settings["k"],
               width, config.rerank, config.nprobe, config.knn_k)
    try:
        return map_targets(config.folder, manifest.get("targets", {}), made, count, width)
    except (ValueError, FileNotFoundError):  # missing, altered, too few or of other settings
        files = Targets.files(count, width)
        parts = {name: open_part(config.folder / f"{name}.part", shape, dtype)
                 for name, (shape, dtype) in files.items()}
        compute_targets(store, settings, Targets(*parts.values()))
        digests = []
        for name, part in parts.items():
            path = config.folder / name
            with growing(path):
                part.flush()
                os.replace(config.folder / f"{name}.part", path)
            digests.append(file_sha(path))
        manifest["targets"] = {"made": made, "count": count, "sha256": digests}
        save_manifest(config, manifest)
        return map_targets(config.folder, manifest["targets"], made, count, width)


def map_targets(folder: Path, made_of: dict, made: str, count: int, width: int) -> Targets:
    """Map targets that are on disk. Raises ValueError or FileNotFoundError where there are none of
    these settings, or not what the manifest says."""
    with reading(folder / MANIFEST, "train again"):
        whole, digests = made_of["count"], made_of["sha256"]
        files = Targets.files(whole, width)
        if made_of["made"] != made or whole < count or len(digests) != len(files):
            raise ValueError("of other settings")
    arrays = []
    for (name, (shape, dtype)), digest in zip(files.items(), digests, strict=True):
        array = map_array(folder / name, shape, dtype, digest, "train again")
        arrays.append(array[:count])
    return Targets(*arrays)


# ══ Training: one loop for the decoders, the plain distillation and the fine-tuned base ══════════
def batches(config: Config, count: int, window: int) -> list[np.ndarray]:
    """Return the starting positions of the rows of every training step: a fresh order and offset an
    epoch."""
    draw = np.random.default_rng(config.seed)
    rows = max(1, config.batch_tokens // window)
    steps = []
    for _ in range(config.num_epochs):
        offset = int(draw.integers(0, max(1, min(window, count - window + 1))))
        starts = np.arange(offset, count - window + 1, window)
        draw.shuffle(starts)
        whole = max(1, len(starts) // rows * rows)  # a last step that is not full is left out
        steps += [starts[i : i + rows] for i in range(0, whole, rows)]
    return steps


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Make AdamW for what is trained, with weight decay on matrices only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() >= 2]
    vectors = [p for p in trained if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def optimize(model: nn.Module, lr: float, steps: list[np.ndarray], loss_of: Callable, label: str,
             field: str) -> None:
    """Train on every batch: warm-up and then cosine to a tenth, gradient norm at most 1. loss_of
    takes starting positions and returns the loss and what the bar shows. Raises Diverged, which
    names the field of the rate."""
    from tqdm import tqdm

    optimizer = make_optimizer(model, lr)
    with tqdm(steps, desc=label, unit="step") as bar:
        for step, starts in enumerate(bar):
            for group in optimizer.param_groups:
                group["lr"] = lr * rate_share(step, len(steps), warmup=0.05, floor=0.1)
            loss, shown = loss_of(starts)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if not math.isfinite(loss.item() + norm.item()):
                raise Diverged(f"{label} diverged at step {step} (loss {loss.item():g}); set "
                               f"{field} below {lr:g}")
            optimizer.step()
            if step % 10 == 0:
                bar.set_postfix_str(shown)


@torch.no_grad()
def new_decoder(config: Config, base: Base, kind: str) -> Decoder | TailDecoder:
    """Make a decoder. A tail starts as the base, another near it: its head is the base's, seen
    through the directions P (D, C) in which the base's output embedding varies most, and hidden
    states enter through the same P. From a random head, a datastore of some million tokens teaches
    too little."""
    torch.manual_seed(config.seed)
    reach = min(config.decoder_reach, base.window)
    if kind == "tail":
        return make_tail(base, base.tap.tail, reach)
    decoder = Decoder(
        kind,
        width=config.decoder_dim,
        layers=config.decoder_layers,
        heads=config.decoder_heads,
        reach=reach,
        vocab=base.vocab,
        key_width=base.width)
    embedding = base.model.get_output_embeddings().weight.detach().float().cpu()  # (V, D)
    directions = torch.linalg.eigh(embedding.T @ embedding).eigenvectors.flip(1)  # (D, D)
    missing = max(0, config.decoder_dim - base.width)
    P = F.pad(directions, (0, missing))[:, : config.decoder_dim]  # (D, C)
    decoder.head.weight.copy_(embedding @ P)
    if kind == "hidden":
        decoder.enter.weight.copy_(P.T)
    return decoder.to(base.device)


def knn_divergence(targets: Targets, at: np.ndarray, log_q: torch.Tensor) -> torch.Tensor:
    """Return KL(p_knn || decoder) at positions at (B, T) -> (B*T,); log q is (B*T, V)."""
    rows, device = at.ravel(), log_q.device
    tokens = torch.from_numpy(targets.tokens[rows]).to(device).long()  # (B*T, M)
    p = torch.from_numpy(targets.weights[rows]).to(device).float()  # (B*T, M)
    return sparse_kl(tokens, normalised(p), log_q)


def logits_of(base: Base, model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The logits (B, T, V) at tokens ids (B, T), behind the prefix, of the base's model or of one
    trained on from it."""
    prefix = torch.tensor(base.prefix, dtype=torch.int64, device=base.device)  # (P,)
    prefixes = prefix.expand(len(ids), -1)  # (B, P)
    out = model(input_ids=torch.cat([prefixes, ids], dim=1), use_cache=False)
    return out.logits[:, len(prefix) :].float()


class Teacher(NamedTuple):
    """What a decoder is to imitate, and how much at each position; the text has the rest."""

    targets: Targets
    share: np.ndarray  # (count,) float32, beta


def make_teacher(config: Config, settings: dict, targets: Targets) -> Teacher:
    """Give the neighbours the share that beta says; auto is what tuning gave them at their
    distance."""
    if config.beta == "auto":
        share = knn_share(targets.near, settings["lambda"], settings["decay"])
    else:
        share = np.full(len(targets.near), config.beta)
    return Teacher(targets, share.astype(np.float32))


def base_divergence(base: Base, ids: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Return KL(p_base || decoder) of tokens ids (B, T) -> (B*T,); log q is (B*T, V)."""
    log_p = logits_of(base, base.model, ids).flatten(0, 1).log_softmax(-1)  # (B*T, V)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def training_positions(config: Config, most: int) -> int:
    """Return how many positions are trained on, of so many."""
    return min(config.train_tokens or most, most)


def read_rows(stream: torch.Tensor, starts: np.ndarray, window: int, device: torch.device
              ) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    """Read training rows -> positions at (B, T), their tokens (B, T) and those that follow, one
    after the other (B*T,)."""
    at = starts[:, None] + np.arange(window)
    ids = stream[at].to(device)
    next_ids = stream[at + 1].flatten().to(device)
    return at, ids, next_ids


def imitation_loss(base: Base, arm: str, teacher: Teacher, at: np.ndarray, ids: torch.Tensor,
                   next_ids: torch.Tensor, log_q: torch.Tensor) -> tuple[torch.Tensor, str]:
    """beta KL(teacher || decoder) + (1 - beta) CE of log q (B*T, V), the mean over positions at and
    tokens ids (B, T) and those that follow (B*T,), and what is shown of it. Of the base as a
    teacher beta is the same everywhere: distances are of the datastore."""
    ce = F.nll_loss(log_q, next_ids, reduction="none")  # (B*T,)
    if arm == "text":
        return ce.mean(), f"CE {ce.mean().item():.3f}"
    if arm == "distilled":
        kl, beta = base_divergence(base, ids, log_q), float(teacher.share.mean())
    else:
        kl = knn_divergence(teacher.targets, at, log_q)  # (B*T,)
        beta = torch.from_numpy(teacher.share[at.ravel()]).to(base.device)  # (B*T,)
    loss = beta * kl + (1 - beta) * ce
    return loss.mean(), f"KL {kl.mean().item():.3f} CE {ce.mean().item():.3f}"


def train_decoder(config: Config, base: Base, domain: Domain, store: Datastore, arm: str,
                  teacher: Teacher, lr: float) -> Decoder | TailDecoder:
    """Train beta KL(teacher || decoder) + (1 - beta) CE; the teacher is the kNN distribution.

    Controls which see no neighbour: arm text has no teacher (beta 0), in arm distilled it is the
    base itself, at the mean of beta. What the datastore adds is the difference to them.
    """
    kind = kind_of(config, arm)
    decoder = new_decoder(config, base, kind)
    stored = store.states if kind == "tail" else store.keys
    count = training_positions(config, len(stored))
    # The base as a teacher is given its whole window, behind its prefix.
    window = min(base.window if arm == "distilled" else decoder.reach, count)

    def loss_of(starts: np.ndarray) -> tuple[torch.Tensor, str]:
        at, ids, next_ids = read_rows(domain.train, starts, window, base.device)
        inputs = torch.from_numpy(stored[at]).to(base.device).float()  # (B, T, D)
        log_q = decoder(inputs, ids).flatten(0, 1).log_softmax(-1)  # (B*T, V)
        return imitation_loss(base, arm, teacher, at, ids, next_ids, log_q)

    steps = batches(config, count, window)
    optimize(decoder, lr, steps, loss_of, f"decoder {arm}", RATE_FIELDS[kind])
    return decoder.eval().requires_grad_(False)


RATE_FIELDS = {"hidden": "decoder_lr", "tokens": "decoder_lr", "tail": "finetune_lrs"}


def kind_of(config: Config, arm: str) -> str:
    """The kind of decoder of an arm."""
    return config.decoder_kind if arm in ("text", "distilled") else arm


def best_decoder(config: Config, base: Base, domain: Domain, store: Datastore, arm: str,
                 teacher: Teacher) -> Decoder | TailDecoder:
    """Train a decoder. A tail, which starts from trained weights, is trained at every rate of
    fine-tuning, and the one whose mixture with the base is better on validation is kept."""
    if kind_of(config, arm) != "tail":
        return train_decoder(config, base, domain, store, arm, teacher, config.decoder_lr)
    best, kept = math.inf, None
    for lr in config.rates():
        decoder = train_decoder(config, base, domain, store, arm, teacher, lr)
        if len(config.rates()) == 1:
            return decoder
        scores = score(config, base, domain.valid, config.tune_tokens, Systems({arm: decoder}),
                       Grid(alphas=[*SHARES, 1.0]), f"{arm} at {lr:g}")
        ppl = min(map(perplexity, scores.mixed[arm]))
        print(f"decoder {arm} at {lr:g}: validation perplexity {ppl:,.2f} with the base")
        if ppl <= best:
            best, kept = ppl, decoder
    return kept


def add_adapters(model: nn.Module, rank: int) -> nn.Module:
    """Put LoRA adapters (Hu et al. 2021) on every projection of a model but its head, in place ->
    the model that peft makes of it, in which nothing else is trained."""
    peft = import_peft()
    is_transposed = model.config.model_type == "gpt2"  # Conv1D, whose weight is (in, out)
    return peft.get_peft_model(model, peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        fan_in_fan_out=is_transposed))


def finetune(config: Config, base: Base, domain: Domain, arm: str, lr: float
             ) -> tuple[Base, dict]:
    """Train a copy of the base, or adapters on it, on as many tokens of the domain as the decoders
    -> the base that comes of it, adapters merged, and what its file holds."""
    torch.manual_seed(config.seed)
    count = training_positions(config, len(domain.train) - 1)
    window = min(base.window, count)
    model = copy.deepcopy(base.model).requires_grad_(True)
    if arm == "lora":
        model = add_adapters(model, config.lora_rank)

    def loss_of(starts: np.ndarray) -> tuple[torch.Tensor, str]:
        _, ids, next_ids = read_rows(domain.train, starts, window, base.device)
        ce = F.cross_entropy(logits_of(base, model, ids).flatten(0, 1), next_ids)
        return ce, f"CE {ce.item():.3f}"

    steps = batches(config, count, window)
    field, name = TUNED[arm]
    optimize(model, lr, steps, loss_of, f"{name} at {lr:g}", field)
    payload = {"lr": lr, "model_state_dict": model.state_dict()}
    if arm == "lora":
        adapters = import_peft().get_peft_model_state_dict(model)
        payload |= {"model_state_dict": adapters, "rank": config.lora_rank}
        model = model.merge_and_unload()
    return dataclasses.replace(base, model=model.eval().requires_grad_(False)), payload


def best_tuned(config: Config, base: Base, domain: Domain, arm: str) -> dict:
    """Train the base on at every rate and keep the better on validation -> payload of its file."""
    field, name = TUNED[arm]
    best, kept = math.inf, {}
    for lr in config.rates(field):
        tuned, payload = finetune(config, base, domain, arm, lr)
        scores = score(config, base, domain.valid, config.tune_tokens, Systems(bases={arm: tuned}),
                       Grid())
        ppl = perplexity(scores.log_p[arm])
        print(f"{name} at {lr:g}: validation perplexity {ppl:,.2f}")
        if ppl <= best:
            best, kept = ppl, payload
    trained = sum(weight.numel() for weight in kept["model_state_dict"].values())
    print(f"{name}: {trained:,} trained parameters")
    return kept


def tuned_of(payload: dict, path: Path, base: Base, arm: str) -> Base:
    """Make the base that was trained on, of what its file holds. Raises ValueError with one
    line."""
    weights = payload["model_state_dict"]
    model = copy.deepcopy(base.model)
    with reading(path, "train again: python memory_decoder.py train"):
        if arm == "lora":
            model = add_adapters(model, payload["rank"])
            adapters = import_peft().get_peft_model_state_dict(model)
            require(weights.keys() == adapters.keys(), "file", str(path),
                    "adapters of every projection of this base")
            import_peft().set_peft_model_state_dict(model, weights)
            model = model.merge_and_unload()
        else:
            model.load_state_dict(weights)
    return dataclasses.replace(base, model=model.eval().requires_grad_(False))


def decoder_size(decoder: Decoder | TailDecoder) -> int:
    """The parameters of a decoder, those of the base that a tail shares apart."""
    return sum(weight.numel() for weight in decoder.state_dict().values())


def arm_path(config: Config, arm: str) -> Path:
    """Return the file of an arm."""
    return config.folder / (DECODER_FILE if arm == config.decoder_kind else ARM_FILES[arm])


def training_of(config: Config, arm: str, chosen: dict) -> dict:
    """What decides the weights of an arm, for its file; tau and k are those of its teacher."""
    names = ["seed", "num_epochs", "train_tokens", "batch_tokens"]
    if arm in TUNED:
        names.append(TUNED[arm][0])
    else:
        names += [RATE_FIELDS[kind_of(config, arm)], "decoder_reach"]
    if arm == "lora":
        names.append("lora_rank")
    teacher = {}
    if arm in RATE_FIELDS or arm == "distilled":  # has a teacher
        names.append("beta")
        if config.beta == "auto":
            teacher = {"lambda": chosen["lambda"], "decay": chosen["decay"]}
    if arm in RATE_FIELDS:  # the neighbours
        names.append("target_width")
        teacher |= {"tau": chosen["tau"], "k": chosen["k"], "distance": DISTANCE}
    return {name: getattr(config, name) for name in names} | teacher


def train(config: Config, base: Base, domain: Domain) -> None:
    """Tune the kNN distribution if it is not yet, write the targets, train every arm."""
    manifest, store = open_built(config, base, domain)
    tune_knn(config, base, domain, store, manifest)
    targets = write_targets(config, store, manifest, training_positions(config, len(store.keys)))
    teacher = make_teacher(config, manifest["settings"], targets)
    print(f"beta: {teacher.share.mean():.2f} on average")
    manifest["settings"].pop("alpha", None)  # of decoders that are gone
    save_manifest(config, manifest)
    for arm in config.arm_list:
        began = time.perf_counter()
        kind = None
        if arm in TUNED:
            payload = best_tuned(config, base, domain, arm)
        else:
            decoder = best_decoder(config, base, domain, store, arm, teacher)
            kind = decoder.kind
            payload = {"sizes": decoder.sizes, "model_state_dict": decoder.state_dict()}
            print(f"decoder {arm}: {decoder_size(decoder):,} parameters")
        payload |= {"arm": arm, "identity": made_for(manifest, kind),
                    "trained_with": training_of(config, arm, manifest["settings"])}
        path = arm_path(config, arm)
        save_tensors(payload, path)
        print(f"wrote {path} ({time.perf_counter() - began:.0f} s)", flush=True)


# ══ Tuning of every system, on validation alone ══════════════════════════════════════════════════
NAMES = {
    "base": "base",
    "knn": "kNN-LM",
    "tail": "memory decoder (tail)",
    "hidden": "memory decoder (hidden)",
    "tokens": "memory decoder (tokens)",
    "both": "both",
    **{arm: name for arm, (_, name) in TUNED.items()},
    "text": "decoder (text alone)",
    "both_text": "text alone and kNN-LM",
    "both_lora": "LoRA and kNN-LM",
    "both_finetuned": "fine-tuned and kNN-LM",
    "distilled": "plain distillation",
}


def searching(config: Config) -> dict[str, str]:
    """The systems that a decoder and a search of the datastore make together, and their decoders:
    beside `both` the same with the decoder that has never seen a neighbour, its control, and with a
    base that was trained on, which looks up with its own states."""
    systems = {"both": config.decoder_kind}
    for arm in ("text", *TUNED):
        if arm in config.arm_list:
            systems[f"both_{arm}"] = arm
    return systems


def load_systems(config: Config, base: Base, domain: Domain) -> tuple[dict, Systems]:
    """Load everything that train left: the manifest and the systems. Raises ValueError or
    FileNotFoundError."""
    manifest, store = open_built(config, base, domain)
    systems = Systems({}, {}, store, {})
    for arm in config.arm_list:
        path = arm_path(config, arm)
        payload = load_trained(path, manifest, arm)
        if arm in TUNED:
            systems.bases[arm] = tuned_of(payload, path, base, arm)
        else:
            decoder = decoder_of(payload, path, base)
            require(decoder.kind == kind_of(config, arm), "file", str(path),
                    f"of kind {kind_of(config, arm)} (it is of {decoder.kind}); train again, or "
                    f"set --decoder_kind {decoder.kind}")
            systems.decoders[arm] = decoder
        with reading(path, "train again"):
            fields = dict(payload.get("trained_with", {}))
        require(arm not in RATE_FIELDS or fields.get("distance") == DISTANCE, "file", str(path),
                "an imitation of the neighbours that are found now (an older version found others);"
                " train again")
        if fields and arm in systems.decoders:
            fields |= shape_of(systems.decoders[arm])
        systems.trained_with[arm] = fields
    joint_training(config, systems)
    return manifest, systems


def shape_of(decoder: Decoder | TailDecoder) -> dict[str, int]:
    """The fields of Config that a decoder's shape follows from; a tail has the base's."""
    if decoder.kind == "tail":
        return {}
    sizes = decoder.sizes
    return {"decoder_dim": sizes["width"], "decoder_layers": sizes["layers"],
            "decoder_heads": sizes["heads"]}


def joint_training(config: Config, systems: Systems) -> dict:
    """What the arms say that they were trained with, joined. Raises ValueError where they are of
    different trainings, as one that was stopped leaves them: where two arms disagree, or one does
    not say. Files of older versions say nothing."""
    joint: dict = {}
    first, *_ = systems.trained_with
    for arm, fields in systems.trained_with.items():
        path = arm_path(config, arm)
        require(bool(fields) == bool(systems.trained_with[first]), "file", str(path),
                f"of the same training as {arm_path(config, first)} (one of the two is of an older "
                "version); train again")
        for name, value in fields.items():
            other = joint.setdefault(name, value)
            require(value == other, "file", str(path), f"trained with {name} {other!r}, as the "
                    f"other arms (it was with {value!r}); train again")
    return joint


def tune(config: Config, base: Base, domain: Domain) -> None:
    """Choose lambda, decay, tau, k, and alpha of every decoder, on validation alone; into the
    manifest."""
    manifest, systems = load_systems(config, base, domain)
    tune_knn(config, base, domain, systems.store, manifest)
    chosen = manifest["settings"]
    shares = [*SHARES, 1.0] if config.alpha == "auto" else [config.alpha]
    grid = Grid(taus=[chosen["tau"]], ks=[chosen["k"]], alphas=shares)
    scores = score(config, base, domain.valid, config.tune_tokens, systems, grid, "validation")
    chosen |= tuned_settings(config, scores, shares, chosen)
    chosen["valid_sha256"] = valid_sha(domain, config.tune_tokens)
    save_manifest(config, manifest)
    both = chosen["both"]
    print(f"  chosen on {chosen['valid_tokens']:,} tokens of validation: alpha "
          f"{chosen['alpha']:g}; both: alpha {both['alpha']:g}, lambda {both['lambda']:g}, decay "
          f"{both['decay']:g}")


def searched_parts(scores: Scores, arm: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what a search is added to for an arm: log p (A, n) by alpha, of a base (1, n); and
    p_knn (n,) and the distance of the nearest key (n,)."""
    if arm in scores.mixed:
        return scores.mixed[arm], scores.knn["base"][0, 0], scores.near["base"]
    return scores.log_p[arm][None], scores.knn[arm][0, 0], scores.near[arm]


def tuned_settings(config: Config, scores: Scores, shares: list[float], knn: dict) -> dict:
    """Choose alpha of every decoder by perplexity, and alpha, lambda and decay of a decoder and a
    search together -> the settings, with the perplexity of every system. `knn` has lambda and decay
    of the search alone."""
    ppl = {name: perplexity(log_p) for name, log_p in scores.log_p.items()}
    (log_base,), *found = searched_parts(scores, "base")
    ppl["knn"] = perplexity(add_knn(log_base, *found, knn["lambda"], knn["decay"]))
    alphas = {}
    for arm, mixed in scores.mixed.items():
        alphas[arm], ppl[arm] = choose_alpha(arm, mixed, shares)

    together = {}
    for system, arm in searching(config).items():
        mixed, *found = searched_parts(scores, arm)
        surface = np.array([best_shares(log_p, *found) for log_p in mixed])  # (A, decays, shares)
        i, r, m = np.unravel_index(surface.argmin(), surface.shape)
        ppl[system] = float(surface.min())
        alpha = None if arm in TUNED else shares[i]
        together[system] = {"alpha": alpha, "lambda": SHARES[m], "decay": DECAYS[r]}
    return {
        "alpha": alphas[config.decoder_kind],
        "alphas": alphas,
        **together,
        "mixing": config.mixing,
        "valid_ppl": ppl,
        "valid_tokens": len(log_base),
    }


def choose_alpha(arm: str, mixed: np.ndarray, shares: list[float]) -> tuple[float, float]:
    """Return the share of a decoder with the lowest perplexity, and that, of log-probabilities by
    share (A, n). Some of the curve is printed."""
    curve = [perplexity(log_p) for log_p in mixed]
    points = []
    for share, ppl in zip(shares, curve, strict=True):
        points.append(f"alpha {share:g}: {ppl:,.2f}")
    print(f"  {NAMES[arm]}: {', '.join(points[::4])}")
    best = curve.index(min(curve))
    return shares[best], curve[best]


# ══ Evaluation: test once, latency, table, picture ═══════════════════════════════════════════════
PASSAGE = 8  # tokens in a row that the datastore's text has too: a passage that it repeats


def passage_hashes(tokens: np.ndarray) -> np.ndarray:
    """A number for every passage of a stream (n,), by its tokens -> uint64 (n - PASSAGE + 1,)."""
    count = max(0, len(tokens) - PASSAGE + 1)
    hashes = np.zeros(count, dtype=np.uint64)
    for i in range(PASSAGE):  # a polynomial modulo 2**64
        part = tokens[i : i + count].astype(np.uint64)
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15)
        hashes += part + np.uint64(1)
    return hashes


def repeated_tokens(tokens: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """Whether each token of a stream (n,) stands in a passage that is in the stored text word for
    word -> bool (n,). Domains repeat themselves, and a datastore then copies."""
    known = passage_hashes(stored)
    found = np.isin(passage_hashes(tokens), known)
    repeated = np.zeros(len(tokens), dtype=bool)
    for i in range(PASSAGE):
        repeated[i : i + len(found)] |= found
    return repeated


def settings_of(system: str, chosen: dict) -> dict:
    """Return alpha, lambda, decay, tau and k that were chosen for a system, None where it has
    none."""
    searched = ("lambda", "decay", "tau", "k")
    settings = {"alpha": chosen["alphas"].get(system)} | dict.fromkeys(searched)
    is_both = system.startswith("both")
    if system == "knn" or is_both:
        settings |= {name: chosen[name] for name in searched}
    if is_both:
        settings |= chosen[system]
    return settings


def answering_systems(config: Config, base: Base, systems: Systems, chosen: dict
                      ) -> dict[str, tuple[MemoryLM, str]]:
    """Return every system as what generates with it: the model and its mode."""
    lm = MemoryLM("", base, None, systems.store, chosen, config.mixing)
    answering = {"base": (lm, "base"), "knn": (lm, "knn")}
    for arm, decoder in systems.decoders.items():
        answering[arm] = (dataclasses.replace(lm, decoder=decoder), "decoder")
    for arm, tuned in systems.bases.items():
        answering[arm] = (dataclasses.replace(lm, base=tuned), "base")
    for system, arm in searching(config).items():
        alone, _ = answering[arm]
        answering[system] = (alone, "knn" if arm in TUNED else "both")
    return answering


@torch.no_grad()
def latency(config: Config, base: Base, systems: Systems, chosen: dict, prompt: list[int]
            ) -> dict[str, list[float]]:
    """Time greedy generation for one user -> milliseconds a token in every turn, by system. The
    systems take turns."""
    answering = answering_systems(config, base, systems, chosen)
    times: dict[str, list[float]] = {system: [] for system in answering}
    for turn in range(config.latency_rounds + 1):
        for system, (lm, mode) in answering.items():
            settings = settings_of(system, chosen)
            shares = [settings[name] or 0 for name in ("alpha", "lambda", "decay")]
            conversation = Conversation(lm, mode)
            reading = conversation.feed(prompt)

            began = time.perf_counter()
            for _ in range(config.latency_tokens):
                log_p, _ = distribution(lm, mode, *shares, reading)
                reading = conversation.feed([int(log_p.argmax())])
            if turn > 0:  # the first warms up
                times[system].append(1e3 * (time.perf_counter() - began) / config.latency_tokens)
    return times


def check_tuned(config: Config, manifest: dict, systems: Systems, domain: Domain) -> None:
    """Raise ValueError where the settings are not those of these systems, or were not tuned on this
    text; older ones do not say on which."""
    chosen = manifest["settings"]
    is_tuned = {"alpha", "decay"} <= chosen.keys() and chosen["mixing"] == config.mixing
    is_whole = systems.decoders.keys() <= chosen.get("alphas", {}).keys()
    is_whole &= searching(config).keys() <= chosen.keys()
    is_whole &= systems.bases.keys() <= chosen.get("valid_ppl", {}).keys()
    require(is_tuned and is_whole, "settings", manifest["domain"], "tuned for these systems: run "
            "python memory_decoder.py tune")
    alpha = chosen["alpha"] if config.alpha == "auto" else config.alpha
    require(alpha == chosen["alpha"], "alpha", alpha, f"the one that was tuned "
            f"({chosen['alpha']:g}): run python memory_decoder.py tune --alpha {alpha:g}")
    text = valid_sha(domain, chosen["valid_tokens"])
    require(chosen.get("valid_sha256", text) == text, "settings", manifest["domain"], "tuned on "
            "the validation text that is there: run python memory_decoder.py tune")


def as_tuned(config: Config, base: Base) -> Config:
    """The Config with the windows and the search that the settings were tuned with, which hold for
    test too; where a field differs, that is printed. Raises ValueError."""
    path = config.folder / MANIFEST
    settings = read_manifest(config.folder)["settings"]
    names = [name for name in ("stride", *SEARCHED_WITH) if name in settings]  # older: not all
    with reading(path, "run python memory_decoder.py tune again"):
        tuned = {name: int(settings[name]) for name in names}
        require(all(value >= 1 for value in tuned.values()), "file", str(path), "whole")
    this = dataclasses.replace(config, stride=config_stride(config, base))
    for name, value in tuned.items():
        if getattr(this, name) != value:
            print(f"evaluate: {name} {value}, as tuned (not {getattr(this, name)}; another has to "
                  "be tuned first)")
    scored = settings.get("valid_tokens", config.tune_tokens)
    return dataclasses.replace(config, **tuned, tune_tokens=scored)


def score_test(config: Config, base: Base, domain: Domain, systems: Systems, chosen: dict
               ) -> dict[str, np.ndarray]:
    """Score test once, with what was chosen on validation -> log-probabilities (n,) by system."""
    alphas, together = chosen["alphas"], searching(config)
    of_both = {chosen[system]["alpha"] for system in together}
    shares = sorted({*alphas.values(), *of_both} - {None})
    grid = Grid(taus=[chosen["tau"]], ks=[chosen["k"]], alphas=shares)
    scores = score(config, base, domain.test, config.eval_tokens, systems, grid, "test")

    log_p = dict(scores.log_p)
    (log_base,), *found = searched_parts(scores, "base")
    log_p["knn"] = add_knn(log_base, *found, chosen["lambda"], chosen["decay"])
    for arm, mixed in scores.mixed.items():
        at = shares.index(alphas[arm])
        log_p[arm] = mixed[at]
    for system, arm in together.items():
        tuned = chosen[system]
        at = 0 if arm in TUNED else shares.index(tuned["alpha"])
        mixed, *found = searched_parts(scores, arm)
        log_p[system] = add_knn(mixed[at], *found, tuned["lambda"], tuned["decay"])
    return log_p


def evaluation_facts(config: Config, base: Base, domain: Domain, systems: Systems, recall: float
                     ) -> dict:
    """What evaluation.json says of an evaluation. What the arms were trained with stands in its
    config, and not what this command would train with."""
    fields = dataclasses.asdict(config)
    trained = joint_training(config, systems)
    fields |= {name: value for name, value in trained.items() if name in fields}
    return run_facts(device_name(base.device)) | {
        "base": base.name,
        "domain": domain.name,
        "keys": len(systems.store.keys),
        "index": systems.store.kind,
        "recall": recall,
        "mixing": config.mixing,
        "config": fields,
        "trained_with": systems.trained_with,
    }


STRETCHES = 8  # of the test text, the units of an interval


class Change(NamedTuple):
    """By what part the perplexity of a system differs from another's on the same tokens, and its 95
    % interval."""

    system: str
    against: str
    ratio: float
    low: float
    high: float


def change_of(log_p: dict[str, np.ndarray], system: str, against: str) -> Change:
    """Compare two systems by log-probabilities (n,), paired by token; the units are eighths of the
    text, because neighbouring tokens are alike."""
    apart = log_p[against] - log_p[system]  # (n,) nats, below 0 where the system is better
    units = [part.mean(dtype=np.float64) for part in np.array_split(apart, STRETCHES)]
    mean = float(apart.mean(dtype=np.float64))
    interval = student_interval(mean, float(np.var(units, ddof=1)) / STRETCHES, STRETCHES - 1)
    ends = (mean, mean - interval.half, mean + interval.half)
    return Change(system, against, *(math.expm1(end) for end in ends))


def changes_of(config: Config, log_p: dict[str, np.ndarray]) -> list[Change]:
    """Compare what a reader will: kNN-LM and the decoder with the base, a decoder with the one of
    text alone, what was trained with the search, and each with and without a search beside it."""
    kind = config.decoder_kind
    pairs = [
        ("knn", "base"),
        (kind, "base"),
        (kind, "knn"),
        (kind, "text"),
        ("both", "both_text"),
        ("both", "knn"),
        ("lora", "knn"),
        ("finetuned", "knn"),
        *searching(config).items(),
    ]
    return [change_of(log_p, *pair) for pair in pairs if set(pair) <= log_p.keys()]


def table_rows(log_p: dict[str, np.ndarray], is_new: np.ndarray, chosen: dict,
               times: dict[str, list[float]]) -> dict[str, dict]:
    """The row of every system, from log-probabilities (n,) of test, of which those that is_new
    (n,) marks stand in no passage that the datastore has."""
    rows = {}
    for system, name in NAMES.items():
        of_system = log_p.get(system)
        if of_system is not None:
            rows[system] = {
                "system": name,
                **settings_of(system, chosen),
                "valid_ppl": chosen["valid_ppl"].get(system),
                "test_ppl": perplexity(of_system),
                "new_ppl": perplexity(of_system[is_new]) if is_new.any() else None,
                "ms_per_token": statistics.median(times[system]) if times else None,
            }
    return rows


def evaluate(config: Config, base: Base, domain: Domain) -> None:
    """Score every system on test once, with what was chosen on validation; time them; write
    evaluation.json, print the table, draw the picture."""
    config = as_tuned(config, base)
    manifest, systems = load_systems(config, base, domain)
    check_tuned(config, manifest, systems, domain)
    chosen = manifest["settings"]
    log_p = score_test(config, base, domain, systems, chosen)
    times = {}
    if config.latency_tokens > 0:
        prompt = domain.test[: min(32, base.window // 2)].tolist()
        times = latency(config, base, systems, chosen, prompt)

    scored = first_tokens(domain.test, config.eval_tokens)[1:].numpy()
    is_new = ~repeated_tokens(scored, domain.train.numpy())
    rows = table_rows(log_p, is_new, chosen, times)
    about = evaluation_facts(config, base, domain, systems, chosen["recall"])
    about["valid_tokens"] = chosen["valid_tokens"]
    about["test_tokens"] = len(is_new)
    about["new_tokens"] = int(is_new.sum())
    changes = changes_of(config, log_p)
    found = {
        "about": about,
        "rows": list(rows.values()),
        "changes": [change._asdict() for change in changes],
    }
    write_json(found, config.folder / "evaluation.json")
    print_table(rows, about)
    print_changes(changes)
    plot(config, rows, manifest, about)


# Columns of the table: key of a row, label, width, format.
COLUMNS = (
    ("alpha", "alpha", 6, "g"),
    ("lambda", "lambda", 7, "g"),
    ("decay", "decay", 6, "g"),
    ("tau", "tau", 8, "g"),
    ("k", "k", 5, "d"),
    ("valid_ppl", "valid", 9, ",.2f"),
    ("test_ppl", "test", 9, ",.2f"),
    ("change", "Δ test", 8, "+.1%"),
    ("new_ppl", "new", 9, ",.2f"),
    ("ms_per_token", "ms", 7, ",.2f"),
)


def print_table(rows: dict[str, dict], about: dict) -> None:
    """Print the comparison, each system against the base."""
    print()
    print_heading(f"What does memory add?   {about['domain']}")
    print(f"  {Path(about['base']).name}; {about['keys']:,} keys ({about['index']}, "
          f"recall {about['recall']:.2f}); "
          f"{about['test_tokens']:,} tokens of test\n")
    labels = "".join(f"{label:>{width}}" for _, label, width, _ in COLUMNS)
    line = "  " + "─" * (24 + len(labels))
    print(f"  {'system':<24}{labels}\n{line}")
    for row in rows.values():
        row = row | {"change": row["test_ppl"] / rows["base"]["test_ppl"] - 1}
        cells = "".join(cell(row[key], form, width) for key, _, width, form in COLUMNS)
        print(f"  {row['system']:<24}{cells}")
    print(line)
    print_gains(rows)
    new = about["new_tokens"] / about["test_tokens"]
    print(f"  new: without the {1 - new:.0%} of test tokens that stand among {PASSAGE} in a row "
          "which the datastore has too")
    print("  settings chosen on validation, test scored once with them; ms a generated token")


def print_changes(changes: list[Change]) -> None:
    """Print each comparison with its interval."""
    print("\n  Change of test perplexity, with the 95 % interval over eighths of the text")
    for change in changes:
        names = f"{NAMES[change.system]} against {NAMES[change.against]}"
        print(f"  {names:<56}{change.ratio:+7.1%}  [{change.low:+.1%}, {change.high:+.1%}]")


def print_gains(rows: dict[str, dict]) -> None:
    """Print which share of the gain of kNN-LM each decoder keeps, and what it costs."""
    base, knn = rows["base"], rows["knn"]
    gain = base["test_ppl"] - knn["test_ppl"]
    for system, row in rows.items():
        if gain > 0 and system in ("tail", "hidden", "tokens", "text", "distilled"):
            share = (base["test_ppl"] - row["test_ppl"]) / gain
            slower = ""
            if row["ms_per_token"] and base["ms_per_token"]:
                ratio = row["ms_per_token"] / base["ms_per_token"]
                slower = f", {ratio:.2f} times the base's latency"
            print(f"  {row['system']}: {share:.0%} of the gain of kNN-LM{slower}")


def draw_surface(axes, manifest: dict) -> None:
    """Draw the validation perplexity of base + kNN over lambda and tau, with a star at the best."""
    tuning, k = manifest["tuning"], manifest["settings"]["k"]
    by_tau = tuning["surface"][tuning["ks"].index(k)]
    surface = np.array(by_tau).T  # (shares, U)
    low = surface.min()
    image = axes.imshow(np.minimum(surface, 1.5 * low), aspect="auto", origin="lower",
                        cmap="viridis_r")
    axes.figure.colorbar(image, ax=axes)
    axes.set_xticks(range(len(tuning["taus"])), [f"{tau:g}" for tau in tuning["taus"]])
    axes.set_yticks(range(0, len(SHARES), 2), [f"{share:g}" for share in SHARES[::2]])
    row, column = np.unravel_index(surface.argmin(), surface.shape)
    axes.plot(column, row, marker="*", ms=16, color=PALETTE[2])
    axes.set(xlabel="tau", ylabel="lambda")
    decay = manifest["settings"]["decay"]
    axes.set_title(f"kNN-LM, validation perplexity, k {k}, decay {decay:g} (★ {low:,.2f})")


def draw_bars(axes, rows: dict[str, dict], tokens: int) -> None:
    """Draw the perplexity of every system on test, the first on top."""
    systems = list(reversed(rows))
    names = [NAMES[system] for system in systems]
    values = [rows[system]["test_ppl"] for system in systems]
    colors = [PALETTE[0] if system == "base" else PALETTE[5] for system in systems]
    bars = axes.barh(names, values, color=colors)
    axes.bar_label(bars, [f"{value:,.2f}" for value in values], padding=3, fontsize=9)
    axes.set(xlabel="perplexity", xlim=(0, 1.15 * max(values)))
    axes.set_title(f"test, {tokens:,} tokens")


def plot(config: Config, rows: dict[str, dict], manifest: dict, about: dict) -> None:
    """Draw plots/memory_decoder.png: what was tuned on validation, what came out on test."""
    path = Path(config.plot_dir) / "memory_decoder.png"
    title = f"{Path(about['base']).stem}, {about['domain']}, {about['keys']:,} keys"
    with dark_figure(path, 1, 2, (13, 5)) as (figure, (left, right)):
        draw_surface(left, manifest)
        draw_bars(right, rows, about["test_tokens"])
        figure.suptitle(plain(title), fontsize=11)


# ══ Main ═════════════════════════════════════════════════════════════════════════════════════════
def describe_run(config: Config, base: Base, domain: Domain) -> None:
    """Print all that a reader needs to judge the figures."""
    lengths = [f"{len(stream):,}" for stream in (domain.train, domain.valid, domain.test)]
    lines = {
        "base": f"{base.name}: {count_parameters(base.model):,} parameters, window {base.window}, "
                f"{base.vocab:,} tokens",
        "domain": f"{domain.name}: train {lengths[0]}, validation {lengths[1]}, test {lengths[2]} "
                  "tokens",
        "device": device_name(base.device)}
    print_banner("memory_decoder: plug a domain into a frozen model", lines, config)


def name_base(config: Config, commands: tuple[str, ...]) -> str:
    """Return the base that is asked for; auto is that of the datastore where none is built."""
    if config.base != "auto":
        return config.base
    if "build" not in commands:
        return read_manifest(config.folder)["base"]
    return find_base(config)


def run(config: Config, commands: tuple[str, ...]) -> None:
    """Run the parts asked for, in order. Of several processes all build, one does the rest."""
    rank, _ = rank_and_size()
    check_folder(config.model_dir, "model_dir")
    check_folder(config.plot_dir, "plot_dir")
    import_faiss()
    with locked(config.folder, "model_dir") if rank == 0 else contextlib.nullcontext():
        name = name_base(config, commands)
        config = settled(config, name)
        base = load_base(name, config.window, config.key, config.tail)
        domain = load_domain(config, base)
        if rank == 0:
            describe_run(config, base, domain)
        parts = {"build": build, "train": train, "tune": tune, "evaluate": evaluate}
        for command in commands:
            if rank == 0 or command == "build":
                parts[command](config, base, domain)


def main(argv: list[str]) -> int:
    """Run a command line -> exit code: 0, 1 diverged, 2 a user's mistake, 128 + signal stopped."""

    def job(stop: StopSignal) -> None:
        commands, words = split_command(argv, COMMANDS)
        run(read_config(Config, words, __doc__), commands)

    return run_command(job, again=["memory_decoder.py", *argv], saved="what was built is kept",
                       sizes="batch_windows, batch_tokens or window")


if __name__ == "__main__":
    print_any_character()
    sys.exit(main(sys.argv[1:]))

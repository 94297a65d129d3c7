"""One frozen language model with a memory, for many users: the decoder, caches, sampling, chat.

A MemoryLM is loaded once from the folder that memory_decoder.py fills, and only read; what belongs
to one answer is a Conversation. The decoder stands here and not with its training, because whoever
chats needs the module and nobody who chats needs the training; mix stands here because it is what
joins base, decoder and kNN distribution into one model. app.py needs this file, datastore.py,
packaged.py and dnc_gpt2.py.

Read downward; each section uses only what stands above it.
The memory decoder is Cao et al. 2025, arXiv 2508.09874.
Letters: B rows, T tokens, P tokens before them, D width of a key, C width of the decoder, H its
attention heads, V vocabulary, k neighbours.
"""

import bisect
import copy
import dataclasses
import functools
import math
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# isort: off
from dnc_gpt2 import (
    # checks
    check_memory,
    require,
    # files
    load_tensors,
    reading,
)
# isort: on
from datastore import (
    MANIFEST,
    NPROBE,
    RERANK,
    Base,
    Datastore,
    Source,
    blocks_of,
    cache_argument,
    check_manifest,
    check_version,
    knn_probabilities,
    knn_share,
    knn_weights,
    load_base,
    open_datastore,
    read_manifest,
    read_sources,
    sha,
)

MODES = ("base", "knn", "decoder", "both")
MESSAGE_LIMIT = 20_000  # characters of one chat message
DECODER_FILE = "memory_decoder.pt"


# ══ Mixing ═══════════════════════════════════════════════════════════════════════════════════════
def mix(log_base: torch.Tensor, log_memory: torch.Tensor, alpha: float, mixing: str = "probability"
        ) -> torch.Tensor:
    """Mix two log-distributions (…, V) by the share alpha of the memory.

    probability: log((1 - alpha) p_base + alpha p_memory); it works on single log-probabilities as
    well. logits: softmax of the weighted mean of logits (log p is as good: a constant falls out).
    alpha 0 and 1 return base and memory themselves.
    """
    if alpha == 0:
        return log_base
    if alpha == 1:
        return log_memory
    if mixing == "logits":
        return ((1 - alpha) * log_base + alpha * log_memory).log_softmax(-1)
    return torch.logaddexp(log_base + math.log1p(-alpha), log_memory + math.log(alpha))


# ══ Memory decoder: hidden states, or tokens, to the vocabulary ══════════════════════════════════
def distance_bias(heads: int, reach: int) -> torch.Tensor:
    """Return what attention adds for query t and key j, which lies reach + t - j tokens before it:
    minus that distance times a slope, another in every head, and -inf outside [0, reach).
    (H, reach, 2 reach). Press et al. 2022, "Train short, test long", arXiv 2108.12409: no position
    is learned, so that short training rows serve any window."""
    t = torch.arange(reach).unsqueeze(1)  # (reach, 1)
    j = torch.arange(2 * reach)  # (2 reach,)
    distance = reach + t - j  # (reach, 2 reach)
    slopes = 2.0 ** (-8 * torch.arange(1, heads + 1) / heads)  # (H,)
    bias = -slopes.view(-1, 1, 1) * distance  # (H, reach, 2 reach)
    return bias.masked_fill((distance < 0) | (distance >= reach), -math.inf)


class Block(nn.Module):
    """A pre-norm transformer block with causal attention over the last `reach` tokens."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor, bias: torch.Tensor, past: torch.Tensor | None
                ) -> tuple[torch.Tensor, torch.Tensor]:
        """Read x (B, T, C), T at most reach, with the bias of distance_bias and the past, keys and
        values (2, B, H, P, C / H) of the tokens before -> x, and the past of the next tokens."""
        B, T, C = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, C // self.heads)
        q, *kv = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, C / H) each
        kv = torch.stack(kv)  # (2, B, H, T, C / H)
        if past is not None:
            kv = torch.cat([past, kv], dim=3)  # (2, B, H, P + T, C / H)

        reach = bias.shape[1]
        P = kv.shape[3] - T
        # Four dimensions: with three, a kernel that is five times slower is taken.
        mask = bias[None, :, :T, reach - P : reach + T]  # (1, H, T, P + T)
        mixed = F.scaled_dot_product_attention(q, kv[0], kv[1], attn_mask=mask)  # (B, H, T, C / H)
        x = x + self.out(mixed.transpose(1, 2).reshape(B, T, C))
        x = x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))
        return x, kv[:, :, :, -reach:]


class Decoder(nn.Module):
    """A small transformer that imitates the kNN distribution without a datastore.

    Kind hidden reads the sequence of keys, so it needs no embedding and knows what the base knows,
    and serves that base alone. This departs from Cao et al., whose 32 heads attend over a single
    vector, so that attention does nothing: here they attend over the states before it. Kind tokens
    is a small GPT-2 (with distances in place of its positions) and a tied head, which serves every
    base with the same tokenizer.
    """

    def __init__(self, kind: str, width: int, layers: int, heads: int, reach: int, vocab: int,
                 key_width: int):
        super().__init__()
        self.kind = kind
        self.reach = reach
        self.sizes = dict(kind=kind, width=width, layers=layers, heads=heads, reach=reach,
                          vocab=vocab, key_width=key_width)
        if kind == "hidden":
            self.norm_in = nn.LayerNorm(key_width)
            self.enter = nn.Linear(key_width, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)  # tokens: its transpose embeds them
        self.register_buffer("bias", distance_bias(heads, reach), persistent=False)
        self.register_buffer("head_half", None, persistent=False)  # set by ready
        self.start(layers)

    def start(self, layers: int) -> None:
        """Draw the weights as GPT-2 does: what is added to the residual stream is drawn smaller."""
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(weight)
            elif weight.dim() == 2 and name != "enter.weight":
                adds = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * layers) if adds else 0.02)

    def forward(self, keys: torch.Tensor | None, ids: torch.Tensor | None,
                cache: list | None = None, kept: int = 0) -> torch.Tensor:
        """Read keys (B, T, D) or ids (B, T), whichever the kind reads -> logits (B, T, V), or
        (B, kept, V) of the last so many tokens. `cache`, a list that is empty at first, holds what
        the next tokens attend to."""
        if self.kind == "hidden":
            x = self.enter(self.norm_in(keys))  # (B, T, C)
        else:
            x = F.embedding(ids, self.head.weight)  # (B, T, C)

        past = list(cache) if cache else [None] * len(self.blocks)
        parts = []
        for part in x.split(self.reach, dim=1):  # each attends to itself and the part before
            for i, block in enumerate(self.blocks):
                part, past[i] = block(part, self.bias, past[i])
            parts.append(part)
        if cache is not None:
            cache[:] = past

        x = self.norm(torch.cat(parts, dim=1)[:, -kept:])
        if self.head_half is not None and x.shape[:2] == (1, 1):
            return F.linear(x.half(), self.head_half).float()
        return self.head(x)

    def ready(self) -> "Decoder":
        """Freeze for use. One token of one user takes as long as its weights take to be read, and
        most of them are the head's: for that case alone they are kept in half precision too (an
        error of a few 1e-3 in a logit, a third of the time on a CPU)."""
        self.head_half = self.head.weight.detach().half()
        return self.eval().requires_grad_(False)


def tail_of(model: nn.Module, blocks: int) -> tuple[nn.Module, nn.ModuleList]:
    """Return a copy of a model that has its last blocks alone, and these. Copied are they and what
    is small: embedding and head are shared, so that a base of billions is not held twice."""
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    shared = {id(embedding): embedding, id(head): head}
    dropped = {id(block): nn.Identity() for block in blocks_of(model)[:-blocks]}
    tail = copy.deepcopy(model, memo=shared | dropped)

    kept = blocks_of(tail)
    del kept[:-blocks]
    settings = tail.config.get_text_config()
    settings.num_hidden_layers = blocks
    if getattr(settings, "layer_types", None):
        settings.layer_types = settings.layer_types[-blocks:]
    for number, block in enumerate(kept):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number  # of the cache
    for module in tail.modules():
        module._forward_pre_hooks.clear()  # the tap's, which is for the base
        module._forward_hooks.clear()
    positions = getattr(tail.base_model, "wpe", None)
    if positions is not None:  # GPT-2 adds them to what it is given; the states have them
        nn.init.zeros_(positions.weight)
    return tail, kept


class TailDecoder(nn.Module):
    """The last blocks of a base, trained on, with its norm and head: it reads the states that enter
    those blocks in the base, and begins as the base itself. This departs from Cao et al., whose
    decoder begins as a small pretrained model: beside a pretrained base, what starts from noise
    would first have to learn the language.

    `begin` (1, P, D) are the states of the prefix, which stands before every text (attention of the
    base rests on it): they stand before the states of every row. None where there is no prefix.

    Only the blocks are trained and kept in its file. Raises ValueError where the blocks of this
    model cannot be run alone.
    """

    kind = "tail"

    def __init__(self, model: nn.Module, blocks: int, reach: int,
                 begin: torch.Tensor | None = None):
        super().__init__()
        self.reach = reach
        self.register_buffer("begin", begin, persistent=False)
        tail, kept = tail_of(model, blocks)
        self.tail = tail.requires_grad_(False)
        self.blocks = kept.requires_grad_(True)
        weight = tail.get_output_embeddings().weight
        self.sizes = dict(kind="tail", blocks=blocks, reach=reach, vocab=weight.shape[0],
                          key_width=weight.shape[1],
                          prefix=0 if begin is None else begin.shape[1])

    def forward(self, states: torch.Tensor, ids: torch.Tensor | None, cache: list | None = None,
                kept: int = 0) -> torch.Tensor:
        """Read states (B, T, D) -> logits (B, T, V), or (B, kept, V) of the last so many tokens.
        `cache`, a list that is empty at first, holds what the next tokens attend to."""
        from transformers import DynamicCache

        kept = kept or states.shape[1]
        if self.begin is not None and not cache:
            begins = self.begin.expand(len(states), -1, -1)  # (B, P, D)
            states = torch.cat([begins, states], dim=1)  # (B, P + T, D)
        options = {"use_cache": cache is not None}
        if cache is not None:
            cache[:] = cache or [DynamicCache()]
            options[cache_argument(type(self.tail))] = cache[0]
        out = self.tail(inputs_embeds=states, logits_to_keep=kept, **options)
        return out.logits.float()

    def state_dict(self, *args, **kwargs) -> dict:
        """The blocks alone."""
        return self.blocks.state_dict(*args, **kwargs)

    def load_state_dict(self, weights: dict, *args, **kwargs) -> object:
        """Load the blocks."""
        return self.blocks.load_state_dict(weights, *args, **kwargs)

    def ready(self) -> "TailDecoder":
        """Freeze for use."""
        return self.eval().requires_grad_(False)


@torch.no_grad()
def make_tail(base: Base, blocks: int, reach: int, is_prefixed: bool = True) -> TailDecoder:
    """Make a decoder of the last blocks of a base, whose states are taken there, behind the prefix
    of the base unless told otherwise: an older version trained without it. Raises ValueError where
    it does not begin as the base."""
    prefix, begin = base.prefix if is_prefixed else (), None
    if prefix:
        base.forward(torch.tensor([prefix]), kept=1)
        begin = base.states  # (1, P, D); they are the same whatever follows
    decoder = TailDecoder(base.model, blocks, reach, begin).to(base.device).eval()
    ids = range(min(8, base.vocab))
    logits, _ = base.forward(torch.tensor([[*prefix, *ids]]), kept=len(ids))
    logits_of_tail = decoder(base.states[:, len(prefix) :], None)
    alike = torch.allclose(logits_of_tail, logits, atol=1e-3, rtol=1e-3)
    require(alike, "decoder_kind", "tail", f"hidden or tokens: the last blocks of "
            f"{base.model.config.model_type} cannot be run alone")
    return decoder


def inputs_of(decoder: nn.Module, keys: torch.Tensor, states: torch.Tensor | None) -> torch.Tensor:
    """What a decoder reads beside tokens: states if it is a tail, else keys."""
    return states if decoder.kind == "tail" else keys


def made_for(manifest: dict, kind: str | None) -> str:
    """Return what trained weights belong to: a datastore, or, for a decoder of tokens, which takes
    any base with its tokenizer, a tokenizer and a text."""
    if kind == "tokens":
        return sha(manifest["tokenizer_sha256"], manifest["text_sha256"])
    return manifest["identity"]


def load_trained(path: Path, manifest: dict, arm: str | None = None) -> dict:
    """Load weights that were trained on a datastore. Raises ValueError where they are missing,
    foreign, of another datastore, or of another arm than the one that is asked for, if any."""
    remedy = "train again: python memory_decoder.py train"
    payload = load_tensors(path, ("identity", "model_state_dict"), remedy)
    trained = payload.get("arm", arm)  # older files may not say
    require(arm in (None, trained), "file", str(path), f"of arm {arm} (it is of {trained}); "
            f"{remedy}, or set --decoder_kind {trained}")
    sizes = payload.get("sizes")
    kind = sizes.get("kind") if isinstance(sizes, dict) else None
    require(payload["identity"] == made_for(manifest, kind), "file", str(path), "trained on the "
            f"datastore that is there (it is of another); {remedy}")
    return payload


def load_decoder(path: Path, base: Base, manifest: dict) -> Decoder | TailDecoder:
    """Load a trained decoder of any kind. Raises ValueError with one line."""
    return decoder_of(load_trained(path, manifest), path, base)


def decoder_of(payload: dict, path: Path, base: Base) -> Decoder | TailDecoder:
    """Make the decoder that a file holds. Raises ValueError with one line."""
    with reading(path, "train again"):
        sizes = payload["sizes"]
        if sizes["kind"] == "tail":
            decoder = make_tail(base, int(sizes["blocks"]), int(sizes["reach"]),
                                is_prefixed="prefix" in sizes)
            decoder.load_state_dict(payload["model_state_dict"])
            return decoder.ready()
        same_width = sizes["kind"] == "tokens" or sizes["key_width"] == base.width
        fits = sizes["vocab"] == base.vocab and same_width
        require(fits, "file", str(path), "a decoder for this base; train again")
        check_memory(decoder_bytes(sizes), "decoder_dim, decoder_layers or decoder_reach")
        decoder = Decoder(**sizes)
        decoder.load_state_dict(payload["model_state_dict"])
        return decoder.to(base.device).ready()


def decoder_bytes(sizes: dict) -> float:
    """The least bytes that the weights of a decoder of these sizes and its attention bias take."""
    width, reach = sizes["width"], sizes["reach"]
    weights = 12 * sizes["layers"] * width**2 + width * (sizes["vocab"] + sizes["key_width"])
    return 4 * (weights + 2 * sizes["heads"] * reach**2) + 50_000 * sizes["layers"]


SEARCHED_WITH = ("nprobe", "rerank", "knn_k")  # fields that tune keeps among the settings


def check_settings(settings: dict) -> None:
    """Raise ValueError, TypeError or KeyError where tuned settings are not the numbers they are."""
    both = settings["both"]
    shares = (settings["alpha"], settings["lambda"], both["alpha"], both["lambda"])
    if not all(0 <= share <= 1 for share in shares) or not 0 < settings["tau"] < math.inf:
        raise ValueError("shares out of range")
    if not all(0 <= decay < math.inf for decay in (settings["decay"], both["decay"])):
        raise ValueError("decay out of range")
    if not 1 <= settings["k"] < 2**31 or settings.get("mixing") not in ("probability", "logits"):
        raise ValueError("no number of neighbours, or no mixing")
    for name in SEARCHED_WITH:
        if not 1 <= settings.get(name, 1) < 2**31:
            raise ValueError(f"{name} out of range")


# ══ One model for many users ═════════════════════════════════════════════════════════════════════
@dataclasses.dataclass(frozen=True, eq=False)
class MemoryLM:
    """Everything loaded once, read-only, shared by all users."""

    name: str
    base: Base
    decoder: Decoder | TailDecoder | None
    datastore: Datastore | None
    settings: dict  # tuned: alpha, lambda, decay, tau, k, both: its first three; SEARCHED_WITH
    mixing: str = "probability"
    sources: tuple[Source, ...] = ()  # of the datastore's documents, in order

    @property
    def tokenizer(self) -> object:
        """The tokenizer of the base."""
        return self.base.tokenizer

    @property
    def window(self) -> int:
        """The tokens that the base sees at once."""
        return self.base.window

    @functools.cached_property
    def newlines(self) -> np.ndarray:
        """Line ends among the values before each (n + 1,)."""
        count = [self.base.decode([token]).count("\n") for token in range(self.base.vocab)]
        counts = np.array(count, dtype=np.int64)[self.datastore.values]
        return np.concatenate([[0], np.cumsum(counts)])

    @staticmethod
    def load(folder: str | Path, base: str = "auto") -> "MemoryLM":
        """Load what a folder of memory_decoder.py holds; the base by the name that it was built
        with (auto) or by where it is now. Raises ValueError or FileNotFoundError, one line each."""
        folder = Path(folder)
        manifest = read_manifest(folder)
        settings = manifest["settings"]
        check_version(folder, manifest)
        if "alpha" not in settings:
            raise FileNotFoundError(f"{folder / MANIFEST}: holds no tuned settings; make them with "
                                    "python memory_decoder.py train, then tune")
        where = manifest["base"] if base == "auto" else base
        with reading(folder / MANIFEST, "run python memory_decoder.py tune again"):
            check_settings(settings)
            window = int(manifest["config"]["window"])
        model = load_base(where, window, manifest["key"], int(manifest.get("tail", 0)))
        check_manifest(folder, model, manifest)
        return MemoryLM(
            name=f"{Path(where).stem} + {manifest['domain']}",
            base=model,
            decoder=load_decoder(folder / DECODER_FILE, model, manifest),
            datastore=open_datastore(
                folder,
                manifest,
                nprobe=settings.get("nprobe", NPROBE),  # older settings say none of these
                rerank=settings.get("rerank", RERANK),
                most=settings.get("knn_k", 0)),
            settings=settings,
            mixing=settings["mixing"],
            sources=tuple(read_sources(folder)))

    def tuned(self, mode: str) -> tuple[float, float]:
        """The alpha and lambda that were tuned for a mode, 0 for what it does not use."""
        both = self.settings.get("both", {})
        shares = {"base": (0, 0), "knn": (0, self.settings.get("lambda", 0)),
                  "decoder": (self.settings.get("alpha", 0), 0),
                  "both": (both.get("alpha", 0), both.get("lambda", 0))}
        alpha, lambda_ = shares[mode]
        return float(alpha), float(lambda_)

    def decay(self, mode: str) -> float:
        """How fast the share of the datastore falls with distance, as tuned for a mode."""
        of_mode = self.settings.get("both", {}) if mode == "both" else self.settings
        return float(of_mode.get("decay", 0))

    def modes(self) -> list[str]:
        """Return the modes that it can answer in."""
        has_store = self.datastore is not None
        has_decoder = self.decoder is not None
        can = {"base": True, "knn": has_store, "decoder": has_decoder,
               "both": has_store and has_decoder}
        return [mode for mode in MODES if can[mode]]


class Reading(NamedTuple):
    """What the models say of the next token of one conversation."""

    log_base: torch.Tensor  # (V,)
    query: torch.Tensor  # (D,)
    log_decoder: torch.Tensor | None  # (V,)


class Conversation:
    """The caches of one answer, which it alone has. When the window is full, the older half is
    dropped and the rest read again."""

    def __init__(self, lm: MemoryLM, mode: str):
        self.lm = lm
        self.decoder = lm.decoder if mode in ("decoder", "both") else None
        self.ids: list[int] = []  # what the caches hold
        self.cache = None  # of the base, a DynamicCache
        self.decoder_cache: list | None = None

    def start_anew(self) -> None:
        """Forget what was read."""
        from transformers import DynamicCache

        self.ids = []
        self.cache = DynamicCache()
        self.decoder_cache = []

    @torch.no_grad()
    def feed(self, new: list[int]) -> Reading:
        """Read tokens after those read before."""
        base, fed = self.lm.base, new
        if self.cache is None or len(self.ids) + len(new) > base.window:
            fed = [*self.ids, *new]
            if len(fed) > base.window:
                fed = fed[-(base.window // 2) :]
            self.start_anew()
        prefix = [] if self.ids else list(base.prefix)
        self.ids += fed

        logits, keys = base.forward(torch.tensor([[*prefix, *fed]]), self.cache, kept=1)
        log_decoder = None
        if self.decoder is not None:
            ids = torch.tensor([fed], device=base.device)
            inputs = inputs_of(self.decoder, keys, base.states)[:, len(prefix) :]
            out = self.decoder(inputs, ids, self.decoder_cache, kept=1)
            log_decoder = out[0, -1].log_softmax(-1)
        return Reading(logits[0, -1].log_softmax(-1), keys[0, -1], log_decoder)


class Near(NamedTuple):
    """The stored positions nearest to a query."""

    distances: torch.Tensor  # (k,)
    ids: np.ndarray  # (k,)
    values: torch.Tensor  # (k,), the tokens that followed there


def nearest(lm: MemoryLM, query: torch.Tensor) -> Near:
    """Search the neighbours of one query (D,)."""
    k = min(lm.settings["k"], len(lm.datastore.keys))
    distances, ids = lm.datastore.search(query.cpu().numpy()[None], k)
    there = ids[0] >= 0
    ids = ids[0][there]
    values = torch.from_numpy(lm.datastore.values[ids])
    return Near(torch.from_numpy(distances[0][there]), ids, values)


def distribution(lm: MemoryLM, mode: str, alpha: float, lambda_: float, decay: float,
                 reading: Reading) -> tuple[torch.Tensor, Near | None]:
    """Mix log p (V,) of the next token: the decoder by alpha in modes decoder and both, then the
    kNN distribution by knn_share of lambda and decay in modes knn and both. Also return what was
    found in the datastore (None where nothing was searched)."""
    log_p, near = reading.log_base, None
    if mode in ("decoder", "both"):
        log_p = mix(log_p, reading.log_decoder, alpha, lm.mixing)
    if mode in ("knn", "both") and lambda_ > 0:
        near = nearest(lm, reading.query)
        p = knn_probabilities(near.distances[None], near.values[None], lm.settings["tau"],
                              len(log_p))[0]
        share = 0.0
        if len(near.ids) > 0:
            nearest_of_all = near.distances[0].numpy()
            share = float(knn_share(nearest_of_all, lambda_, decay))
        log_p = mix(log_p, p.log().to(log_p.device), share)
    return log_p, near


# ══ Generation ═══════════════════════════════════════════════════════════════════════════════════
class Sampling(NamedTuple):
    """How to answer."""

    mode: str  # base | knn | decoder | both
    alpha: float  # share of the decoder, in modes decoder and both; 0 = none
    lambda_: float  # share of the kNN distribution at distance 0, in modes knn and both; 0 = none
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
    place: str = ""  # file and line, "" where they were not kept
    passage: tuple[str, str] = ("", "")  # of that document, before the token and behind it


class Step(NamedTuple):
    """One generated token. Probabilities are those before temperature and top_k."""

    token: int
    text: str  # what it adds to the answer; "" while a character is incomplete
    changed: bool  # the base alone, with the same noise, would have taken base_token
    base_token: str
    base_probability: float  # of the token, by the base alone
    probability: float  # of the token, by the mixture
    neighbours: list[Neighbour]  # the heaviest five; [] in mode base


def choose(log_p: torch.Tensor, noise: torch.Tensor, sampling: Sampling) -> int:
    """Draw a token from log p (V,) with Gumbel noise (V,), or, at temperature 0, take the
    likeliest."""
    if sampling.temperature == 0:
        return int(log_p.argmax())
    if 0 < sampling.top_k < len(log_p):
        least = log_p.topk(sampling.top_k).values[-1]
        log_p = log_p.masked_fill(log_p < least, -math.inf)
    return int((log_p / sampling.temperature + noise).argmax())


def texts_of(base: Base, *parts: list[int]) -> list[str]:
    """Return the texts of tokens that stand one part behind the other. Decoded alone, a part loses
    the space that it begins with (tokenizers of Llama 2 and Mistral); here it is what it adds to
    those before it. A character that is cut between two parts stands with the later."""
    ids: list[int] = []
    texts, text, shown = [], "", ""
    for part in parts:
        shown = text.rstrip("\ufffd")
        ids += part
        text = base.decode(ids)
        texts.append(text.rstrip("\ufffd")[len(shown) :])
    texts[-1] = text[len(shown) :]
    return texts


PASSAGE = (90, 40)  # tokens before and behind a neighbour that a reader is shown


def source_of(lm: MemoryLM, at: int) -> tuple[str, tuple[str, str]]:
    """Where the value of key `at` stands: file and line, and the passage before and behind it in
    its document. Both empty where sources were not kept."""
    # Value i is token i + 1 of the stream, whose first token is no value.
    number = bisect.bisect_right(lm.sources, at + 1, key=lambda source: source.start) - 1
    if number < 0:
        return "", ("", "")
    source = lm.sources[number]
    first = max(0, source.start - 1)
    end = len(lm.datastore.values)
    if number + 1 < len(lm.sources):
        end = lm.sources[number + 1].start - 1

    stored = lm.datastore.values
    ids_before = stored[max(first, at - PASSAGE[0]) : at].tolist()
    ids_behind = stored[at + 1 : min(end, at + 1 + PASSAGE[1])].tolist()
    before, _, behind = texts_of(lm.base, ids_before, [int(stored[at])], ids_behind)
    line = source.line
    if line > 0:
        line += int(lm.newlines[at] - lm.newlines[first])
    else:
        said = lm.base.decode([int(stored[at])])
        line = line_in_library(source.name, before, said + behind)
    place = f"{source.name}:{line}" if line else source.name
    return place, (before, behind)


def line_in_library(name: str, before: str, behind: str) -> int:
    """The line of a file of Python's library where the texts before and behind a place meet; 0
    where no line, or more than one, holds all of that line and follows the one before it."""
    *_, previous, begun = ["", *before.split("\n")]
    line = without_space(begun + behind.partition("\n")[0])
    previous = without_space(previous)
    lines = ("", *library_lines(name))
    found = []
    for number in range(1, len(lines)):
        if line in lines[number] and previous in lines[number - 1]:
            found.append(number)
    return found[0] if line and len(found) == 1 else 0


def without_space(text: str) -> str:
    """A text without its white space: a docstring is not indented as its file is."""
    return "".join(text.split())


@functools.lru_cache(maxsize=256)
def library_lines(name: str) -> tuple[str, ...]:
    """The lines of a file of Python's library without white space, () where there is no such
    file."""
    path = Path(sysconfig.get_paths()["stdlib"]) / name
    if ".." in Path(name).parts or not path.is_file():
        return ()
    text = path.read_text(encoding="utf-8", errors="replace")
    return tuple(map(without_space, text.splitlines()))


def show_neighbours(lm: MemoryLM, near: Near, token: int, most: int = 5) -> list[Neighbour]:
    """Return the heaviest neighbours, with the text before them and where it stands; those that
    voted for the token first."""
    stored = lm.datastore.values
    weights = knn_weights(near.distances, lm.settings["tau"]).tolist()
    values = near.values.tolist()
    order = sorted(range(len(values)), key=lambda j: (values[j] != token, -weights[j]))
    shown = []
    for j in order[:most]:
        at = int(near.ids[j])
        before = stored[max(0, at - 8) : at].tolist()
        context, voted = texts_of(lm.base, before, [values[j]])
        place, passage = source_of(lm, at)
        shown.append(Neighbour(
            token=voted,
            context=context,
            distance=float(near.distances[j]),
            weight=weights[j],
            place=place,
            passage=passage))
    return shown


def generate(lm: MemoryLM, ids: list[int], sampling: Sampling) -> Iterator[Step]:
    """Answer token by token. Thread-safe: caches and noise belong to this call. Raises ValueError
    at once for settings that cannot be, and ends at an end-of-text token."""
    require(sampling.mode in lm.modes(), "mode", sampling.mode, "one of " + ", ".join(lm.modes()))
    require(0 <= sampling.alpha <= 1, "alpha", sampling.alpha, "from 0 to 1")
    require(0 <= sampling.lambda_ <= 1, "lambda", sampling.lambda_, "from 0 to 1")
    require(0 <= sampling.temperature < math.inf, "temperature", sampling.temperature,
            "0 (greedy) or more")
    require(sampling.top_k >= 0, "top_k", sampling.top_k, "0 (all) or more")
    require(len(ids) > 0, "prompt", "", "some text")
    return steps_of(lm, ids, sampling)


def describe(lm: MemoryLM, reading: Reading, log_p: torch.Tensor, token: int, base_token: int,
             before: list[int], text: str, near: Near | None) -> Step:
    """Say what a step did: the token, the text that it adds, and what the base alone had taken
    behind the tokens before."""
    changed = token != base_token
    if changed and near is None and lm.datastore is not None:
        near = nearest(lm, reading.query)  # the decoder learned from such neighbours
    return Step(
        token=token,
        text=text,
        changed=changed,
        base_token=texts_of(lm.base, before, [base_token])[1],
        base_probability=float(reading.log_base[token].exp()),
        probability=float(log_p[token].exp()),
        neighbours=[] if near is None else show_neighbours(lm, near, token))


def steps_of(lm: MemoryLM, ids: list[int], sampling: Sampling) -> Iterator[Step]:
    """Generate the steps of an answer, whose settings have been checked."""
    conversation = Conversation(lm, sampling.mode)
    draw = torch.Generator().manual_seed(sampling.seed)
    ends = lm.base.end_ids()
    answer: list[int] = []
    shown, fed = "", list(ids)
    for number in range(1, sampling.max_new_tokens + 1):
        reading = conversation.feed(fed)
        log_p, near = distribution(lm, sampling.mode, sampling.alpha, sampling.lambda_,
                                   lm.decay(sampling.mode), reading)
        noise = -torch.empty(len(log_p)).exponential_(generator=draw).log().to(log_p.device)
        token = choose(log_p, noise, sampling)
        base_token = choose(reading.log_base, noise, sampling)
        if token in ends:
            return
        answer.append(token)
        fed = [token]

        text, added = lm.base.decode(answer), ""
        is_whole = not text.endswith("\ufffd")  # else a character is incomplete
        if is_whole or number == sampling.max_new_tokens:
            added, shown = text[len(shown) :], text
        yield describe(lm, reading, log_p, token=token, base_token=base_token,
                       before=answer[-9:-1], text=added, near=near)


# ══ Chat ═════════════════════════════════════════════════════════════════════════════════════════
def chat_text(lm: MemoryLM, messages: list[dict]) -> str:
    """Write messages under the base's chat template, or, without one, as plain text, a turn a line:
    a model that knows no chat continues what it is given. Raises ValueError."""
    if not getattr(lm.tokenizer, "chat_template", None):
        return "\n".join(message["content"] for message in messages)
    try:
        return lm.tokenizer.apply_chat_template(messages, tokenize=False,
                                                add_generation_prompt=True)
    except Exception as error:  # of a template, which may raise what it likes
        raise ValueError(f"messages: the chat template of {lm.base.name} refuses them ({error})"
                         ) from None


def check_messages(messages: list[dict]) -> None:
    """Raise ValueError where the last message is empty, or one is enormous or no text."""
    last = messages[-1]["content"] if messages else ""
    require(last.strip() != "", "message", last, "some text; it is empty")
    for message in messages:
        text = message["content"]
        require(len(text) <= MESSAGE_LIMIT, "message", text[:20] + "…", f"at most {MESSAGE_LIMIT:,}"
                f" characters ({len(text):,} are too many)")
        require(not re.search("[\ud800-\udfff]", text), "message", "…", "text in UTF-8")


def prompt_ids(lm: MemoryLM, messages: list[dict]) -> list[int]:
    """Tokenize messages, without the prefix, which generate puts there itself."""
    ids = lm.base.encode(chat_text(lm, messages))
    skipped = len(lm.base.prefix)
    if tuple(ids[:skipped]) == lm.base.prefix:
        ids = ids[skipped:]
    return ids


def chat_ids(lm: MemoryLM, messages: list[dict], reserve: int) -> tuple[list[int], int]:
    """Return the prompt of a conversation ({"role", "content"} each), and how many of its oldest
    turns were dropped, whole, so that it leaves `reserve` tokens of the window (at most half of it)
    for the answer. A system message stays. Raises ValueError for messages that cannot be."""
    check_messages(messages)
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns = [message for message in messages[len(system) :] if message["content"].strip()]
    room = lm.window - min(max(0, reserve), lm.window // 2)

    def fits(dropped: int) -> bool:
        return len(prompt_ids(lm, system + turns[dropped:])) <= room

    starts = [0]
    for number, turn in enumerate(turns[1:], 1):
        if turn["role"] == "user":  # no answer without its question; many templates refuse it too
            starts.append(number)
    # From the newest turn backwards in growing steps as long as it fits, then between the last two:
    # most of a conversation that is far too long is never tokenized.
    first = fitting = len(starts) - 1
    step = 1
    while first > 0 and fits(starts[first]):
        fitting = first
        first = max(0, first - step)
        step *= 2
    first = bisect.bisect_left(starts, True, first, fitting, key=fits)

    dropped = starts[first]
    ids = prompt_ids(lm, system + turns[dropped:])
    if len(ids) > room:
        raise ValueError(f"message: has {len(ids):,} tokens, the window has room for {room:,}; "
                         "shorten it")
    return ids, dropped

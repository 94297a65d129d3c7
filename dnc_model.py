"""GPT-2 with a memory as transformers knows models: DNCGPT2ForCausalLM generates, trains, is saved.

The memory, the window and the mixture are those of dnc_gpt2.py. A folder that save_pretrained or
`dnc_gpt2.py --export` wrote carries this file with what it uses of that one written into it, and so
loads with torch and transformers alone, with trust_remote_code.

Letters: B rows, T tokens of a call, C hidden width, V vocabulary, N memory slots, W tokens of the
window of attention.
"""

from pathlib import Path
from typing import Literal, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, GPT2Config, GPT2Model, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from dnc_gpt2 import (
    Count,
    NotNegative,
    Pointer,
    Reading,
    Share,
    Whole,
    build_memory,
    check_fields,
    check_rows_and_links,
    map_state,
    point,
    read_on,
    standalone_source,
    start_reading,
)

# ══ What generate() hands from step to step ══════════════════════════════════════════════════════
# The argument's name; renamed in transformers 5.24.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class StateCache:
    """The state of B rows, which has a `fill` (B,), and the columns that each of them has read."""
    is_compileable = False
    is_croppable = False
    is_linear = ()  # of its layers: prepare_inputs_for_generation cuts the columns, not generate()

    def __init__(self, state: tuple, read: Tensor | None = None) -> None:
        self.state = state
        if read is None:
            read = torch.zeros(len(state.fill), 0, dtype=torch.bool, device=state.fill.device)
        self.read = read  # (B, columns so far) bool

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The columns so far."""
        return self.read.shape[1]

    def behind(self, state: tuple, mask: Tensor) -> "StateCache":
        """The cache behind columns that were read where mask (B, T) is 1."""
        return StateCache(state, torch.cat((self.read, mask.to(self.read)), dim=1))

    def mask_of(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Which of new tokens (B, T) are to be read, (B, T) bool, by a mask of their columns, or of
        the columns so far as well.

        Raises ValueError where rows or columns do not fit, and where a mask says otherwise of what
        was read than the cache: generate() lets rows that have ended read on with the others.
        """
        (B, T), (rows, seen) = tokens.shape, self.read.shape
        if rows != B:
            raise ValueError(f"{CACHE}: of {rows} rows, but input_ids has {B}; hand over as many "
                             "rows, or start without a cache")
        if attention_mask is None:
            return torch.ones_like(tokens, dtype=torch.bool)

        shape = tuple(attention_mask.shape)
        if shape not in ((B, T), (B, seen + T)):
            raise ValueError(f"attention_mask: {shape}; must be of the {T} new columns, or of them "
                             f"and the {seen} so far, in {B} rows; leave it out where nothing is "
                             "padding")
        earlier, new = attention_mask.bool().split([shape[1] - T, T], dim=1)
        if shape[1] > T:
            self.check(earlier)
        return new

    def check(self, earlier: Tensor) -> None:
        """Raise ValueError unless what was read is what a mask (B, columns so far) shows."""
        differs = (earlier.to(self.read) != self.read).any(1)
        rows = differs.nonzero()
        if len(rows):
            raise ValueError(f"attention_mask: row {int(rows[0])} of the cache has read columns "
                             "that are padding now, or left out others; read the conversations "
                             "from the start, without the cache")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the rows by those at beam_idx (B,)."""
        index = beam_idx.to(self.state.fill.device)
        as_they_are = torch.arange(len(index), device=index.device)
        if not torch.equal(index, as_they_are):
            self.state = map_state(lambda x: x.index_select(0, index), self.state)
            self.read = self.read.index_select(0, index)


def given_cache(cache: object, past_key_values: object) -> StateCache | None:
    """The cache that was given by one of its two names, or None. Raises ValueError where both were,
    and for a cache of transformers' own, which holds no memory, even if it is empty."""
    if cache is None:
        cache = past_key_values
    elif past_key_values is not None:
        raise ValueError(f"cache and past_key_values: two names of one; hand it over as {CACHE}")
    # Every saved folder has a class of its own of that name, so isinstance would refuse too much.
    if cache is not None and type(cache).__name__ != StateCache.__name__:
        raise ValueError(f"{CACHE}: of type {type(cache).__name__}; must be what an earlier call "
                         "returned, which holds the memory; leave it out to start anew")
    return cache


class StatefulCausalLM(PreTrainedModel, GenerationMixin):
    """A model whose forward takes and returns a StateCache."""
    main_input_name = "input_ids"
    _supports_sdpa = True  # eager too; either is handed on to the base
    accepts_loss_kwargs = False  # Trainer then divides by the batches that it accumulates

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes its own

    def prepare_inputs_for_generation(self, input_ids: Tensor,
                                      attention_mask: Tensor | None = None,
                                      **kwargs: object) -> dict:
        """The columns that the cache has not seen, of all, which generate() hands over. Raises
        ValueError for what forward would refuse: generate() would return a tuple of None."""
        outputs = {name: kwargs.get(name) for name in ("output_attentions", "output_hidden_states")}
        refuse_unused(outputs, type(self).__name__)
        cache = kwargs.get(CACHE)
        seen = 0 if cache is None else cache.get_seq_length()
        if seen >= input_ids.shape[1]:
            raise ValueError(f"input_ids: {input_ids.shape[1]} columns, and the cache has read "
                             f"{seen}; hand over all columns so far, and new ones")
        return {"input_ids": input_ids[:, seen:], "attention_mask": attention_mask, CACHE: cache,
                "use_cache": True, "logits_to_keep": 1}

    def generate(self, *args: object, **kwargs: object) -> object:
        """As GenerationMixin's; the cache may be given by either of its names. Raises ValueError
        for another one than forward returns, and for assisted decoding: what an assistant guessed
        wrong would have to leave the memory again, which cannot forget what it has read."""
        for name in ("assistant_model", "prompt_lookup_num_tokens"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name}: not supported, as a memory cannot forget wrong guesses; "
                                 "leave it out")
        cache = given_cache(kwargs.pop("cache", None), kwargs.pop("past_key_values", None))
        if cache is not None:
            kwargs[CACHE] = cache
        return super().generate(*args, **kwargs)

    def resize_token_embeddings(self, *args: object, **kwargs: object) -> nn.Embedding:
        """As PreTrainedModel's; what is saved then is built with as many tokens."""
        embedding = super().resize_token_embeddings(*args, **kwargs)
        self.config.base = self.config.base | {"vocab_size": self.config.vocab_size}
        return embedding


def refuse_unused(kwargs: dict, name: str) -> None:
    """Raise ValueError for an argument of forward that a model would not use."""
    for argument, value in kwargs.items():
        if value is not None and value is not False:
            raise ValueError(f"{argument}: not used by {name}; leave it out")


def token_ids(ids: Tensor | None, name: str) -> Tensor:
    """The token numbers (B, T) of an argument of forward, of any type of whole numbers, as int64,
    which indices are. Raises ValueError where they are none."""
    if ids is None:
        raise ValueError(f"{name}: required, since the memory keeps tokens")
    if ids.dim() != 2 or ids.is_floating_point():
        raise ValueError(f"{name}: {ids.dtype} of {tuple(ids.shape)}; must be whole numbers of "
                         "(rows, columns)")
    return ids.long()


def kept_columns(logits_to_keep: int | Tensor) -> tuple:
    """The index of (B, T, ...) that takes the last so many columns, all for 0, or those named by a
    tensor (n,). Raises ValueError for another tensor."""
    if not isinstance(logits_to_keep, Tensor):
        return slice(None), slice(-logits_to_keep, None)
    if logits_to_keep.dim() != 1:
        raise ValueError(f"logits_to_keep: a tensor of {tuple(logits_to_keep.shape)}; must be a "
                         "whole number, or places of columns (n,)")
    return slice(None), logits_to_keep


def head_logits(h: Tensor, weight: Tensor, pointer: Pointer | None) -> Tensor:
    """h (B, T, C), the embedding (V, C) and what the tokens point to -> log p (B, T, V); but where
    no weight is, the base's logits, bit for bit, with the gradient of log p."""
    logits = h @ weight.T
    if pointer is None:
        return logits
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_p = pointer.mix(logits.log_softmax(-1, dtype=dtype))
    is_closed = (pointer.weights == 0).all(-1, keepdim=True)
    if not torch.is_grad_enabled():
        return torch.where(is_closed, logits.to(dtype), log_p)
    as_it_was = logits.detach() + (log_p - log_p.detach())
    return torch.where(is_closed, as_it_was, log_p)


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of labels (B, T), shifted here, -100 not scored: logits (B, T, V)."""
    labels = token_ids(labels, "labels")
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def open_from_zero(x: Tensor) -> Tensor:
    """tanh(x), but 0 where x < 0; the gradient is that of tanh everywhere: below 0 a clamp has
    none, and would never open again."""
    y = torch.tanh(x)
    return y + (y.clamp_min(0) - y).detach()


# ══ Configuration ════════════════════════════════════════════════════════════════════════════════
# What transformers builds of a configuration without any field.
TINY_BASE = {"vocab_size": 256, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}


class DNCGPT2Config(PretrainedConfig):
    """GPT-2's configuration, `base`, and the fields of dnc_gpt2.Config that say what the memory is,
    under the same names and of the same types."""
    model_type = "dnc_gpt2"

    def __init__(self, base: dict | None = None,
                 seq_len: Whole = 0,  # W, tokens of the window, 0 = the base's positions
                 stride: Whole = 0,  # tokens that leave a full window, 0 = half of it
                 memory: Literal["dnc", "gru", "delta", "cache", "none"] = "dnc",
                 mem_slots: Count = 64,
                 mem_width: Count = 128,
                 num_reads: Count = 4,
                 pointing: bool = True,
                 pointer_gate: bool = False,  # pointing is learnt from nothing: step 0 is the base
                 split_rows: bool = True,
                 row_key: Literal["previous", "own"] = "previous",
                 empty_slot: bool = True,
                 usage_decay: Share | Literal["auto"] = "auto",
                 min_surprisal: NotNegative = 0.0,  # as in folders that are older than it
                 use_links: bool = False,
                 mask_min: Share = 1.0,
                 dealloc_wipe: bool = False,
                 sharpen_links: bool = False,
                 lambda_vocabulary: NotNegative = 1.0,  # of the vocabulary's own loss in training
                 scan: Literal["auto", "eager", "fused"] = "auto",
                 **kwargs) -> None:
        auto_map = {
            "AutoConfig": "dnc_model.DNCGPT2Config",
            "AutoModel": "dnc_model.DNCGPT2ForCausalLM",  # with its head: there is none without
            "AutoModelForCausalLM": "dnc_model.DNCGPT2ForCausalLM",
        }
        # The embedding is the head: one parameter, not two that are tied.
        super().__init__(**{"tie_word_embeddings": False, "auto_map": auto_map} | kwargs)
        self.base = base or GPT2Config(**TINY_BASE).to_dict()
        gpt2 = GPT2Config(**self.base)
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            setattr(self, name, getattr(gpt2, name))

        self.seq_len = seq_len or gpt2.n_positions
        self.stride = stride
        self.memory = memory
        self.mem_slots = mem_slots
        self.mem_width = mem_width
        self.num_reads = num_reads
        self.pointing = pointing
        self.pointer_gate = pointer_gate
        self.split_rows = split_rows
        self.row_key = row_key
        self.empty_slot = empty_slot
        self.usage_decay = usage_decay
        self.min_surprisal = min_surprisal
        self.use_links = use_links
        self.mask_min = mask_min
        self.dealloc_wipe = dealloc_wipe
        self.sharpen_links = sharpen_links
        self.lambda_vocabulary = lambda_vocabulary
        self.scan = scan

    @classmethod
    def field_types(cls) -> dict[str, object]:
        """What each field of the memory has to be, by its name."""
        hints = get_type_hints(cls.__init__, include_extras=True)
        return {name: hint for name, hint in hints.items() if name not in ("base", "return")}

    def check(self) -> None:
        """Raise ValueError with field, value and requirement where a field does not fit."""
        check_fields(self, self.field_types())
        check_rows_and_links(self)
        positions = GPT2Config(**self.base).n_positions
        if not 1 <= self.seq_len <= positions:
            raise ValueError(f"seq_len = {self.seq_len}: must be from 1 to the base's positions "
                             f"({positions})")
        if not 0 <= self.stride <= self.seq_len:
            raise ValueError(f"stride = {self.stride}: must be from 0 (half of the window) to "
                             f"seq_len ({self.seq_len})")


# ══ Model ════════════════════════════════════════════════════════════════════════════════════════
# GenerationMixin is named once more: where it is no direct base, the Auto classes load a subclass
# of the same name, and what pickle finds under that name is not the class of the model.
class DNCGPT2ForCausalLM(StatefulCausalLM, GenerationMixin):
    """GPT2Model, the memory over its last hidden states, the head tied to the embedding.

    When the window is full its first `stride` tokens leave it and the rest is encoded again; the
    memory goes on token by token without end. With stride = seq_len windows do not overlap, as in
    dnc_gpt2.py's training and evaluation.
    """
    config_class = DNCGPT2Config
    base_model_prefix = "controller"

    def __init__(self, config: DNCGPT2Config) -> None:
        super().__init__(config)
        config.check()
        kind = {"attn_implementation": self.config._attn_implementation}
        self.controller = GPT2Model(GPT2Config(**config.base | kind))
        self.memory = build_memory(config)
        self.gate = nn.Parameter(torch.zeros(())) if config.pointer_gate else None
        self.post_init()

    @classmethod
    def from_gpt2(cls, name: str, **fields: object) -> "DNCGPT2ForCausalLM":
        """A pretrained GPT-2, by hub name or folder, with a fresh memory: fields of DNCGPT2Config.
        Its logits are GPT-2's until the memory has learnt something. Raises ValueError for a field
        that neither it nor transformers has."""
        tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
        own = DNCGPT2Config.field_types()
        for field in fields:
            if field not in {*own, *tokens, *vars(PretrainedConfig())}:
                raise ValueError(f"{field}: must be a field of DNCGPT2Config: {', '.join(own)}")
        controller = GPT2Model.from_pretrained(name)
        base = controller.config.to_dict()
        shipped = {"pointer_gate": True, "min_surprisal": 4.0}
        for name in tokens:
            shipped[name] = getattr(controller.config, name, None)
        model = cls(DNCGPT2Config(base=base, **shipped | fields))
        model.controller.load_state_dict(controller.state_dict())
        return model

    @classmethod
    def from_pretrained(cls, *args: object, output_loading_info: bool = False, **kwargs: object):
        """As PreTrainedModel's; what a file lacks, such as a memory that is new, or has in another
        size (ignore_mismatched_sizes) starts as in a model that was built."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        mismatched = {name for name, *_ in info["mismatched_keys"]}
        names = mismatched.union(info["missing_keys"])
        if names:
            fresh, own = cls(model.config).state_dict(), model.state_dict()
            for name in names:
                own[name].copy_(fresh[name])
        return (model, info) if output_loading_info else model

    def _init_weights(self, module: nn.Module) -> None:
        """Leave parameters as they were built: the memory's first values are chosen ones."""

    def save_pretrained(self, save_directory: str | Path, *args: object, **kwargs: object) -> None:
        """As PreTrainedModel's, and the code that the folder needs."""
        super().save_pretrained(save_directory, *args, **kwargs)
        code = standalone_source(Path(__file__))
        (Path(save_directory) / "dnc_model.py").write_text(code, encoding="utf-8")

    def push_to_hub(self, repo_id: str, **kwargs: object) -> str:
        """As PreTrainedModel's; the card is that of the folder that the model was loaded from."""
        address = super().push_to_hub(repo_id, **kwargs)
        card = Path(self.config._name_or_path) / "README.md"
        if card.is_file():
            import huggingface_hub

            huggingface_hub.upload_file(path_or_fileobj=card, path_in_repo="README.md",
                                        repo_id=repo_id, token=kwargs.get("token"))
        return address

    def init_state(self, rows: int) -> tuple | None:
        """The memory's state of rows that have read nothing."""
        return None if self.memory is None else self.memory.init_state(rows)

    def read(self, tokens: Tensor, mask: Tensor, state: Reading
             ) -> tuple[Tensor, Reading, Pointer | None]:
        """Read tokens (B, T) where mask (B, T) -> h with memory (B, T, C), the state behind them,
        what they point to, of (B, T, N) weights, or None."""
        counts = mask.sum(1)
        is_padded = not bool(mask.all())
        order = back = None
        if is_padded:
            order = (~mask).int().argsort(dim=1, stable=True)  # real tokens first
            back = order.argsort(dim=1)
            tokens = tokens.gather(1, order)
        _, h, state, trace = read_on(self, tokens, counts, state, self.config.stride)
        pointer = self.pointer(trace)
        if is_padded:
            h = rows_at(h, back)
            pointer = pointer and Pointer(*(rows_at(part, back) for part in pointer))
        return h, state, pointer

    def pointer(self, trace: tuple | None) -> Pointer | None:
        """What a trace points to, of (B, T, N) weights; None where nothing points."""
        if trace is None or not self.config.pointing:
            return None
        shape = trace.tokens.shape
        tokens, weights = (part.view(shape) for part in point(trace))
        if self.gate is not None:
            weights = weights * open_from_zero(self.gate)
        return Pointer(tokens, weights)

    @can_return_tuple
    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                cache: StateCache | None = None, labels: Tensor | None = None,
                logits_to_keep: int | Tensor = 0, use_cache: bool | None = None,
                past_key_values: StateCache | None = None,
                **kwargs: object) -> CausalLMOutputWithPast:
        """input_ids (B, T), attention_mask (B, T) or of all columns so far, 0 = padding -> logits
        (B, T, V), of a memory that points log p of the mixture, loss, cache.

        labels (B, T) are shifted here, -100 is not scored; in training lambda_vocabulary times the
        loss of the vocabulary alone is added. The cache is called past_key_values before
        transformers 5.24. Raises ValueError for an argument that it would not use.
        """
        refuse_unused(kwargs, "DNCGPT2ForCausalLM")
        tokens = token_ids(input_ids, "input_ids")
        cache = given_cache(cache, past_key_values)
        if cache is None:
            cache = StateCache(start_reading(self, len(tokens)))
        mask = cache.mask_of(tokens, attention_mask)

        h, state, pointer = self.read(tokens, mask, cache.state)
        cache = cache.behind(map_state(Tensor.detach, state), mask)
        kept = kept_columns(logits_to_keep)
        pointer = pointer and pointer.rows(kept)
        weight = self.controller.wte.weight
        logits = head_logits(h[kept], weight, pointer)
        loss = None
        if labels is not None:
            loss = next_token_loss(logits, labels)
        if labels is not None and self.training and pointer is not None:
            alone = next_token_loss(h[kept] @ weight.T, labels)
            loss = loss + self.config.lambda_vocabulary * alone
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """x (B, T, ...) with its columns in the order of index (B, T)."""
    shape = (*index.shape, *[1] * (x.dim() - 2))
    return x.gather(1, index.view(shape).expand_as(x))

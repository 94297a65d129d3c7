#!/usr/bin/env python3
"""Does a frozen decoder recall what has left its window?  With and without an EDM memory.

    python edm_gpt2.py                         a base, every arm trained, tables, picture, a sample
    python edm_gpt2.py --resume auto           go on where a run was stopped: what is measured stays
    python edm_gpt2.py --help                  every Config field, its default and its comment
    python edm_gpt2.py --base gpt2 --window 256 --seeds 0,1,2 --dataset ID:CONFIGURATION_OF_THE_HUB
    python edm_gpt2.py --base HuggingFaceTB/SmolLM2-135M --window 256 --arms edm
    python edm_gpt2.py --generate "The old bridge" --memory_file notebook.pt

edm_model.py is the model; this file has its base, training, evaluation, tables and generation.
Letters as there: B rows, T tokens, C hidden width, V vocabulary, W tokens of the window.
"""

import collections
import dataclasses
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
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
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GPT2Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

import edm_model

# Names stand by what they are for.
# isort: off
from dnc_gpt2 import (
    # types of Config fields
    Bound, Count, NotNegative, Positive, Whole,
    # checks
    check_fields, check_memory, controller_parameters, require, require_field,
    # the shell of a command, and its device
    Diverged, OtherRun, StopSignal, asks_for, check_commands, local_device, print_any_character,
    read_config, run_command,
    # files
    check_file, check_folder, file_sha, growing, load_tensors, locked, read_json, reading,
    save_tensors, write_json, write_text,
    # the base
    load_checkpoint, newest_baselines, train_baseline,
    # what a reader is told
    LINE, PALETTE, cell, dark_figure, device_name, print_banner, print_heading, rate_share,
    perplexity, run_facts,
    # generation and export
    map_state, pick_token, standalone_source, with_end_token,
    # data and loss
    asking_hub, encode_text, evaluation_rows, head_loss, hub_reachable, load_corpus,
    load_tokenizer, training_rows,
)
from edm_model import (
    # the model, its state and what it has read
    EDMConfig, EDMForCausalLM, EDMGPT2ForCausalLM, EDMGPT2State, Pass,
    # choices and a bound of its fields, the bases that it runs besides GPT-2
    MOST_SLOTS, Eviction, KeyOf, ROTARY,
    # what a read points to, the base's head, and the logits with both
    head_logits, head_weight, pointer_of,
    # adapters; a memory in a file
    add_lora, import_optional, quantize, pack_memory, unpack_memory,
)
from packaged import INSTALL, packaged_base, packaged_file
from packaged import NAME as PACKAGED
# isort: on

# ══ Config ═══════════════════════════════════════════════════════════════════════════════════════
# The notebook and the recurrent memories of each arm; "full" is the base at its whole window,
# "adapters" the base with the LoRA adapters that the others have beside their memories.
FLAGS = {
    "base": (False, False),
    "adapters": (False, False),
    "recurrent": (False, True),
    "edm": (True, False),
    "both": (True, True),
}
TRAINED = ("recurrent", "edm", "both")

Window = Annotated[int, Bound("8 or more, the length of a planted string", lambda x: x >= 8)]
Block = Annotated[int, Bound("-1 (the middle block), or a block's number from 0",
                             lambda x: x >= -1)]
Swapped = Annotated[int, Bound("2 or more, to swap memories", lambda x: x >= 2)]
SwappedOrNone = Annotated[int, Bound("2 or more, to swap memories, or 0, not to measure it",
                                     lambda x: x == 0 or x >= 2)]
BelowOne = Annotated[float, Bound("from 0 to below 1", lambda x: 0 <= x < 1)]
Prompt = Annotated[str, Bound("a prompt", lambda x: x.strip() != "")]
Names = Annotated[str, Bound("names of the base's projections", lambda x: x.strip() != "")]


@dataclasses.dataclass(frozen=True)
class Config:
    """Every constant of a run. Edit here, or override as `--name value`."""

    # base and data
    base: str = "auto"  # auto (yours, gpt2, SmolLM2, or trained) | smollm2 | hub | folder | .pt
    base_dir: str = "checkpoints/"  # where auto looks for a baseline, and trains one
    base_steps: Count = 600  # of the base that auto trains
    base_positions: Count = 512  # its window
    dataset: str = "auto"  # as in dnc_gpt2.py: auto, hub id, folder with train, valid and test.txt
    # memory
    arms: str = "recurrent,edm,both"  # of these; the base is always there
    window: Window = 64  # W, tokens that attention sees
    read_layer: Block = -1  # before this block the notebook is read; -1 = the middle one
    edm_heads: Whole = 0  # H of the notebook; 0 = those of the base
    key_width: Whole = 0  # D of its keys and values; 0 = that of the base
    slots: Count = 8192  # N
    top_k: Count = 32  # slots that a head reads
    eviction: Eviction = "fifo"  # what makes room when every slot is taken
    key_of: KeyOf = "previous"  # whose hidden state a stored token is found by
    pointing: bool = True  # a read points at the tokens that it finds; needs key_of previous
    write_every: Count = 1  # every so many tokens one is stored
    recurrent_width: Count = 128  # R of the early and of the late memory
    reset_token: str = ""  # behind this token memory starts anew, such as <|endoftext|>
    # adapters
    lora: Whole = 0  # rank of LoRA adapters on the base, 0 = none
    lora_alpha: Count = 16  # their scale times the rank
    lora_dropout: BelowOne = 0.05  # of what goes into an adapter, in training
    lora_targets: Names = "auto"  # modules of the base that get one; auto = by its kind
    qlora: bool = False  # the base in 4 bits (bitsandbytes), with adapters
    # training
    seeds: str = "0"  # of the memories' weights, one run each
    max_steps: Count = 200  # of every arm
    batch_size: Count = 16  # windows a step
    bptt_segments: Count = 4  # consecutive windows of a row in one step: the gradient's reach
    lr: Positive = 2e-3  # peak of AdamW
    lr_warmup: BelowOne = 0.05  # share of the steps with a linearly rising rate; then cosine to 0
    weight_decay: NotNegative = 0.0  # of AdamW
    grad_clip: Positive = 1.0  # global gradient norm
    # evaluation
    eval_rows: Swapped = 8  # parallel rows of validation and test
    eval_tokens: Whole = 0  # of each split, 0 = all
    recall_rows: SwappedOrNone = 32  # planted strings of each distance, 0 = no such table
    topic_rows: SwappedOrNone = 8  # prompts whose rare words should return, 0 = no such table
    full_window: Window = 1024  # at most so many tokens of the base at its own, longer window
    log_every_steps: Count = 50  # a row of history in the JSON file
    save_dir: str = "checkpoints/edm_gpt2/"  # the last arm of the first seed
    plot_dir: str = "plots/"  # edm_gpt2.json and edm_gpt2.png
    resume: Literal["", "auto", "anew"] = ""  # auto: keep what edm_gpt2.json has of these settings
    # | anew: auto, or over another run's files
    # generation
    text: Prompt = "The city was built on"  # continued when training is done
    generate: str = ""  # continue this with the model in save_dir; no training
    new_tokens: Count = 60  # of a continuation
    temperature: NotNegative = 0.8  # 0 = the most likely token
    memory_file: str = ""  # with generate: go on with this memory if it is there, and write it

    @property
    def arm_list(self) -> list[str]:
        """The arms to train, in order, each once; with lora the adapters alone are one of them."""
        control = ["adapters"] if self.lora else []
        return list(dict.fromkeys(control + self.arms.replace(" ", "").split(",")))

    @property
    def seed_list(self) -> list[int]:
        """The seeds in order."""
        return [int(seed) for seed in self.seeds.split(",")]

    @property
    def rows(self) -> int:
        """Parallel rows of the training stream."""
        return self.batch_size // self.bptt_segments

    def __post_init__(self) -> None:
        check_fields(self)
        require_field(self, "arms", set(self.arms.replace(" ", "").split(",")) <= set(TRAINED),
                      "a comma-separated choice of " + ", ".join(TRAINED))
        seeds = [seed.strip() for seed in self.seeds.split(",")]
        are_seeds = all(re.fullmatch(r"[0-9]{1,10}", seed) and int(seed) < 2**32 for seed in seeds)
        require_field(self, "seeds", are_seeds, "a comma-separated list of whole numbers from 0 to "
                      "2**32 - 1")
        require_field(self, "bptt_segments", self.batch_size % self.bptt_segments == 0,
                      f"a divisor of batch_size ({self.batch_size})")
        require_field(self, "slots", self.window <= self.slots <= MOST_SLOTS,
                      f"from window ({self.window}) to {MOST_SLOTS}, as far as exact search goes")
        require_field(self, "top_k", self.top_k <= self.slots, f"at most slots ({self.slots})")
        require_field(self, "pointing", self.key_of == "previous" or not self.pointing,
                      f"False with key_of {self.key_of}; set --pointing False")
        require_field(self, "qlora", self.lora > 0 or not self.qlora,
                      "False without adapters; set --lora 8")


# ══ The base ═════════════════════════════════════════════════════════════════════════════════════
class Base(NamedTuple):
    """A decoder to be frozen."""
    name: str
    config: dict  # of its transformers configuration
    weights: dict  # of its model without a head
    tokenizer: object  # tokenizers.Tokenizer
    origin: str  # the data set that it was trained on, "" if not known
    head: Tensor | None = None  # (V, C), None where it is the embedding

    def kind(self) -> type[EDMForCausalLM]:
        """The model that runs it."""
        return EDMForCausalLM if self.config.get("model_type") in ROTARY else EDMGPT2ForCausalLM

    def settings(self) -> PretrainedConfig:
        """Its transformers configuration."""
        return self.kind().config_class(base=self.config).of_base()


def load_base(config: Config) -> Base:
    """Load the base that Config names. Raises ValueError where it cannot be had or used."""
    if config.base == "auto":
        return choose_base(config)
    if config.base.endswith(".pt"):
        return base_of_checkpoint(Path(config.base), config)
    return base_of_model(config.base, config)


def choose_base(config: Config) -> Base:
    """The newest baseline in base_dir whose own window is longer, so that there is something to
    compare with; else gpt2 from the hub, SmolLM2 from its package, or a small one that is trained
    now; says which."""
    base = own_base(config)
    if base is not None:
        return base
    try:
        base = base_of_model("gpt2", config)
        print("base auto: gpt2, from the hub", flush=True)
        return base
    except ValueError as error:
        print(f"base auto: {error}")
    if packaged_file():
        print(f"base auto: {PACKAGED}, from its package; slow on a CPU, where --arms edm and "
              "fewer --max_steps shorten it", flush=True)
        return base_of_model(PACKAGED, config)
    return base_of_checkpoint(train_base(config), config)


def own_base(config: Config) -> Base | None:
    """The newest baseline in base_dir with a window longer than Config's, None where none has."""
    for path in newest_baselines(config.base_dir):
        try:
            base = base_of_checkpoint(path, config)
        except ValueError as error:
            print(f"base auto: passed over {error}")
            continue
        if base.settings().max_position_embeddings > config.window:
            print(f"base auto: {path}, the newest that you trained; --base {PACKAGED} is a "
                  "pretrained one", flush=True)
            return base
        print(f"base auto: passed over {path}: its own window is {config.window} too, which leaves "
              "no longer one to compare with; a lower --window takes it")
    return None


def train_base(config: Config) -> Path:
    """Train a baseline in base_dir -> its checkpoint."""
    print(f"base auto: no baseline in {Path(config.base_dir)} has a window longer than "
          f"{config.window} (a pretrained one: {INSTALL}); training one: {config.base_steps} steps "
          f"at a window of {config.base_positions}", flush=True)
    require_field(config, "window", config.window <= config.base_positions,
                  f"at most base_positions ({config.base_positions}), the window of the base")
    return train_baseline(
        seq_len=config.base_positions,
        batch_size=2,
        max_steps=config.base_steps,
        dataset=config.dataset,
        save_every_steps=config.base_steps + 1,
        log_every_steps=50,
        eval_tokens=16_384,
        save_dir=config.base_dir,
        plot_dir=str(Path(config.plot_dir) / "base"),
    )


def base_of_model(name: str, config: Config) -> Base:
    """A decoder of the hub, of a folder written by save_pretrained, or of a package."""
    if name == PACKAGED:
        return base_of_model(str(packaged_base()), config)._replace(name=PACKAGED)
    with asking_hub("base", name, "a folder written by a decoder's save_pretrained, or a "
                    "checkpoint of dnc_gpt2.py"):
        settings = AutoConfig.from_pretrained(name, trust_remote_code=False)
    check_base(name, settings, config)
    with asking_hub("base", name, "a folder with the weights of a decoder, in safetensors"):
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, config=settings,
                                                     use_safetensors=True, trust_remote_code=False)
    head = None
    if not settings.tie_word_embeddings:
        head = model.get_output_embeddings().weight.detach()
    return Base(Path(name).name, settings.to_dict(), model.base_model.state_dict(),
                load_tokenizer(name), origin="", head=head)


def base_of_checkpoint(path: Path, config: Config) -> Base:
    """The controller of a checkpoint of dnc_gpt2.py."""
    from tokenizers import Tokenizer

    payload = load_checkpoint(path)
    with reading(path, "name another --base"):
        settings = GPT2Config(**json.loads(payload["controller"]))
        check_base(str(path), settings, config)
        tokenizer = Tokenizer.from_str(payload["tokenizer"])
    require(payload["arm"] == dnc_gpt2.ARMS["baseline"], "base", str(path),
            f"a baseline (this is {payload['arm']}, whose memory would be left out)")
    weights = {name.removeprefix("controller."): weight
               for name, weight in payload["model_state_dict"].items()
               if name.startswith("controller.")}
    no_ends = {"bos_token_id": None, "eos_token_id": None}
    return Base(path.name, settings.to_dict() | no_ends, weights, tokenizer,
                origin=payload["corpus"])


def check_base(name: str, settings: transformers.PretrainedConfig, config: Config) -> None:
    """Raise ValueError unless these are the settings of a decoder that is run, with enough
    positions."""
    kind = settings.model_type
    require(kind in ("gpt2", *ROTARY), "base", name,
            f"a GPT-2, or one of {', '.join(ROTARY)} (this is {kind})")
    if kind == "gpt2":
        is_plain = settings.scale_attn_weights and settings.tie_word_embeddings
        is_other = settings.scale_attn_by_inverse_layer_idx or settings.add_cross_attention
        require(is_plain and not is_other, "base", name,
                "a GPT-2 with plain attention and a tied head")
    positions, layers = settings.max_position_embeddings, settings.num_hidden_layers
    require_field(config, "window", config.window <= positions,
                  f"at most the {positions} positions of {name}; set --window")
    require_field(config, "read_layer", config.read_layer < layers,
                  f"below the {layers} blocks of {name}")
    if kind != "gpt2":
        EDMConfig(base=settings.to_dict(), window=config.window).check_base()


def device() -> torch.device:
    """The GPU where there is one, under torchrun that of LOCAL_RANK."""
    return local_device()


def build_model(base: Base, config: Config, arm: str, seed: int) -> EDMForCausalLM:
    """The base with the memories of an arm, whose weights are of the seed; evaluated by blocks: a
    full window leaves whole (generation has it leave by halves)."""
    has_notebook, has_recurrent = FLAGS[arm]
    torch.manual_seed(seed)
    kind = base.kind()
    settings = kind.config_class(
        base=base.config,
        window=config.window,
        stride=config.window,
        document_end=document_end(base, config),
        edm=has_notebook,
        read_layer=config.read_layer,
        edm_heads=config.edm_heads,
        key_width=config.key_width,
        slots=config.slots,
        read_top_k=config.top_k,
        eviction=config.eviction,
        write_every=config.write_every,
        key_of=config.key_of,
        pointing=config.pointing,
        bptt_segments=config.bptt_segments,
        early=has_recurrent,
        late=has_recurrent,
        recurrent_width=config.recurrent_width,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    rows = max(config.rows, config.eval_rows, config.topic_rows)
    check_memory(model_bytes(settings, rows), SIZES)
    model = kind(settings)
    with reading(base.name, "name another --base"):
        model.transformer.load_state_dict(base.weights)
        if base.head is not None:
            model.lm_head.load_state_dict({"weight": base.head})
    if has_notebook:
        model.decoder.start(model.edm, settings.read_layer)
    if config.lora and arm != "base":
        adapt(model, config)
    if config.qlora:  # the base alone as well, which the others are compared with
        model.config.quantize = True
        quantize(model.transformer)
    model.freeze()
    return model.to(device())


SIZES = ("window, slots, edm_heads, key_width, recurrent_width, batch_size, eval_rows, topic_rows "
         "or recall_rows")


def base_parameters(settings: EDMConfig) -> int:
    """The parameters of the base of a configuration, and of its head."""
    base = settings.of_base()
    if base.model_type == "gpt2":
        return controller_parameters(base)
    head = 0 if base.tie_word_embeddings else base.vocab_size * base.hidden_size
    with torch.device("meta"):  # has shapes and no numbers
        model = AutoModel.from_config(base)
    return head + sum(p.numel() for p in model.parameters())


def model_bytes(settings: EDMConfig, rows: int) -> float:
    """The least bytes that a model takes with the state of so many rows."""
    width = settings.hidden_size
    across = settings.edm_heads * settings.key_width if settings.edm else 0  # of all heads
    late = settings.recurrent_width if settings.early or settings.late else 0
    weights = base_parameters(settings)
    weights += 3 * width * across + 2 * late * (late + width)
    if settings.lora:
        weights += 2 * settings.lora["r"] * width * settings.num_hidden_layers
    state = (settings.window + 1) * width + 2 * settings.slots * across
    return 4 * (weights + rows * state)


def document_end(base: Base, config: Config) -> int:
    """The id of reset_token, -1 for none."""
    if not config.reset_token:
        return -1
    token = base.tokenizer.token_to_id(config.reset_token)
    require_field(config, "reset_token", token is not None, "a token of the base's tokenizer")
    return token


def lora_targets(config: Config, kind: str) -> list[str]:
    """The modules of a kind of base that get an adapter."""
    if config.lora_targets != "auto":
        return config.lora_targets.replace(" ", "").split(",")
    if kind == "gpt2":
        return ["c_attn", "c_proj"]  # peft has c_attn alone
    import_optional("peft", "lora")
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as BY_KIND

    require_field(config, "lora_targets", kind in BY_KIND,
                  f"names of modules: peft has none for {kind}")
    return list(BY_KIND[kind])


def adapt(model: EDMForCausalLM, config: Config) -> None:
    """Put adapters on the base."""
    model.config.lora = {
        "r": config.lora,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": lora_targets(config, model.transformer.config.model_type),
        "fan_in_fan_out": model.decoder.projection is not nn.Linear,  # Conv1D is stored transposed
    }
    add_lora(model.transformer, model.config.lora)


# ══ Training ═════════════════════════════════════════════════════════════════════════════════════
GATE_RATE = 5.0  # rate of gates and strengths, as a multiple of lr


def read_tokens(model: EDMForCausalLM, tokens: Tensor, state: EDMGPT2State, **options: bool
                ) -> tuple[Tensor, EDMGPT2State, list[Pass]]:
    """Read tokens (B, T), none of them padding -> h (B, T, C), state, passes."""
    every = torch.ones_like(tokens, dtype=torch.bool)
    return model.advance(tokens, every, state, **options)


def read_logits(model: EDMForCausalLM, tokens: Tensor, state: EDMGPT2State, kept: slice
                ) -> tuple[Tensor, EDMGPT2State, list[Pass]]:
    """As read_tokens, with the logits (B, kept, V) of the mixture at some of the T places."""
    h, state, passes = read_tokens(model, tokens, state)
    pointer = pointer_of(passes, tokens.shape[1])
    pointer = pointer and pointer.rows((slice(None), kept))
    return head_logits(h[:, kept], head_weight(model), pointer), state, passes


def score(model: EDMForCausalLM, h: Tensor, passes: list[Pass], targets: Tensor
          ) -> tuple[Tensor, Tensor]:
    """h (B, T, C), the passes that made it, targets (B, T) -> mean loss (), nll (B, T)."""
    weight = head_weight(model).detach()
    pointer = pointer_of(passes, targets.shape[1])
    if pointer is not None:
        pointer = map_state(lambda x: x.flatten(0, 1), pointer)  # of (B * T, H * K) weights
    loss, nll, _ = head_loss(h.flatten(0, 1), weight, targets.flatten(), h.dtype, pointer)
    return loss, nll.view(targets.shape)


def make_optimizer(model: EDMForCausalLM, config: Config) -> torch.optim.Optimizer:
    """AdamW over what is trained, in two groups with a peak rate each."""
    trained = [p for p in model.parameters() if p.requires_grad]
    # Gates and strengths are single numbers that have far to go: gates open from zero.
    scalars = [p for p in trained if p.dim() < 2 and p.numel() <= model.config.edm_heads]
    others = [p for p in trained if all(p is not scalar for scalar in scalars)]
    groups = [
        {"params": others, "peak": config.lr},
        {"params": scalars, "peak": GATE_RATE * config.lr},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95),
                             weight_decay=config.weight_decay)


def set_rates(optimizer: torch.optim.Optimizer, step: int, config: Config) -> None:
    """Give both groups their rates of this step."""
    share = rate_share(step, config.max_steps, config.lr_warmup, floor=0.0)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share


def train_step(model: EDMForCausalLM, optimizer: torch.optim.Optimizer, chunk: Tensor,
               state: EDMGPT2State, config: Config) -> tuple[float, EDMGPT2State]:
    """One step on chunk (rows, step_len + 1) -> loss, state without its graph."""
    h, state, passes = read_tokens(model, chunk[:, :-1], state)
    state = map_state(Tensor.detach, state)
    loss, _ = score(model, h, passes, chunk[:, 1:])
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    norm = nn.utils.clip_grad_norm_(trained, config.grad_clip)
    check_finite(loss.item() + norm.item(), f"lr = {config.lr}: a loss or gradient")
    optimizer.step()
    return loss.item(), state


def check_finite(value: float, what: str) -> None:
    """Raise Diverged where a value is not finite."""
    if not math.isfinite(value):
        raise Diverged(f"{what} is not finite; set a lower --lr")


def training_chunks(stream: Tensor, config: Config) -> Iterator[tuple[Tensor, bool]]:
    """Of each step the chunk (rows, step_len + 1), and whether the rows begin with it."""
    step_len = config.bptt_segments * config.window
    rows = training_rows(stream, config.rows, step_len)  # (rows, steps * step_len + 1)
    per_epoch = (rows.shape[1] - 1) // step_len
    for step in range(config.max_steps):
        at = step % per_epoch * step_len
        yield rows[:, at : at + step_len + 1].to(device()), at == 0


def finite_mean(losses: list[float], arm: str) -> float:
    """The mean loss of some steps. Raises Diverged where it is not finite."""
    mean = sum(losses) / len(losses)
    check_finite(mean, f"the loss of {arm}")
    return mean


def train_arm(base: Base, corpus: dnc_gpt2.Corpus, config: Config, arm: str, seed: int
              ) -> tuple[EDMForCausalLM, list[dict], float]:
    """Train the memories (and adapters) of an arm -> model, history rows, tokens a second. Raises
    Diverged where the loss is not finite."""
    from tqdm import tqdm

    model = build_model(base, config, arm, seed).train()
    optimizer = make_optimizer(model, config)
    history, losses, tokens = [], [], 0
    began = time.perf_counter()
    with tqdm(total=config.max_steps, desc=f"{arm}, seed {seed}", dynamic_ncols=True) as bar:
        for step, (chunk, is_start) in enumerate(training_chunks(corpus.train, config)):
            if is_start:
                state = model.init_state(config.rows)
            set_rates(optimizer, step, config)
            try:
                loss, state = train_step(model, optimizer, chunk, state, config)
            except Diverged as error:
                raise Diverged(f"{arm}, step {step}, {error}") from None
            losses.append(loss)
            tokens += chunk[:, 1:].numel()
            bar.update()

            done = step + 1
            if done % config.log_every_steps == 0 or done == config.max_steps:
                mean = finite_mean(losses, arm)
                history.append({"arm": arm, "seed": seed, "step": done, "loss": mean})
                bar.set_postfix_str(f"loss {mean:.3f}")
                losses.clear()
    speed = tokens / (time.perf_counter() - began)
    return model.eval(), history, speed


# ══ Evaluation: likelihood, by distance ══════════════════════════════════════════════════════════
@torch.no_grad()
def evaluate(model: EDMForCausalLM, stream: Tensor, rows: int, swap: bool = False) -> Tensor:
    """Negative log-likelihood (rows, L) in nats of every token of a stream but the first; 0 where a
    row is filled up. With `swap` a row is scored with the memory that the row before it has at that
    place, and goes on with its own. Raises Diverged where one is not finite."""
    from tqdm import tqdm

    inputs, targets = evaluation_rows(stream, rows)
    W = model.config.window
    state = model.init_state(rows)
    nll = []
    windows = list(zip(inputs.split(W, 1), targets.split(W, 1), strict=True))
    for x, y in tqdm(windows, desc="scoring", leave=False, dynamic_ncols=True):
        x, y = x.to(device()), y.to(device())
        if swap:
            full = state.fill == W
            if bool(full.any()):
                state = model.leave_rows(full, state, recent=[], read_only=False)
            h, _, passes = read_tokens(model, x, with_memories_of_others(state), read_only=True)
            _, state, _ = read_tokens(model, x, state)
        else:
            h, state, passes = read_tokens(model, x, state)
        nll.append(score(model, h, passes, y)[1].double().cpu())
    nll = torch.cat(nll, dim=1)
    check_finite(float(nll.sum()), "a loss of evaluation")
    return nll


def with_memories_of_others(state: EDMGPT2State) -> EDMGPT2State:
    """The state in which each row has the memories of the row before it."""

    def from_row_before(x: Tensor) -> Tensor:
        return x.roll(1, 0)

    return state._replace(
        memory=map_state(from_row_before, state.memory),
        early=from_row_before(state.early),
        late=from_row_before(state.late),
    )


def windows_back(stream: Tensor, rows: int, window: int) -> np.ndarray:
    """(rows, L): how many windows before the window of a prediction its target stood last; 0 in the
    same window, -1 never before in its row."""
    inputs, targets = evaluation_rows(stream, rows)
    back = np.full(inputs.shape, -1)
    for row in range(rows):
        last = {}  # of each token its last place
        pairs = zip(inputs[row].tolist(), targets[row].tolist(), strict=True)
        for t, (token, target) in enumerate(pairs):
            last[token] = t
            if target in last:
                back[row, t] = t // window - last[target] // window
    return back


BACK = (0, 1, 2, 4, 8, 16, 32, 64)  # lower ends of the buckets of windows_back


def bucket_names() -> list[str]:
    """The buckets of BACK, and that of tokens that were never there before, for people."""
    names = ["in the window"]
    for low, next_low in zip(BACK[1:], BACK[2:], strict=False):
        names.append(str(low) if next_low == low + 1 else f"{low}-{next_low - 1}")
    return [*names, f"{BACK[-1]}+", "new"]


def by_distance(nll: Tensor, back: np.ndarray, scored: Tensor) -> list[dict]:
    """Count and mean loss of the scored tokens of each bucket; nll, back and scored (rows, L)."""
    bucket = np.searchsorted(BACK, back, side="right") - 1
    bucket = np.where(back < 0, len(BACK), bucket)
    rows = []
    for number, name in enumerate(bucket_names()):
        chosen = torch.from_numpy(bucket == number) & scored
        count = int(chosen.sum())
        loss = float(nll[chosen].sum()) / count if count else None
        rows.append({"windows_back": name, "tokens": count, "loss": loss})
    return rows


# ══ Evaluation: recall of a planted string, topic ════════════════════════════════════════════════
RECALL_WINDOWS = (1, 2, 4, 8, 16, 32, 64)
RECALL_TOKENS = 65_536  # of one call


@torch.no_grad()
def planted_recall(model: EDMForCausalLM, stream: Tensor, config: Config, seed: int = 0,
                   swap: bool = False) -> list[dict]:
    """A string of eight random tokens, text, and the string again, so many windows later: the share
    of its last four tokens that are the most likely ones, and their mean loss (nats). Strings and
    text are others for another seed. With `swap` the first string is another row's."""
    from tqdm import tqdm

    distances = [windows for windows in RECALL_WINDOWS
                 if config.recall_rows and len(stream) >= windows * config.window + 8]
    results = []
    for windows in tqdm(distances, desc="recall", leave=False, dynamic_ncols=True):
        tokens = plant(stream, windows, config, model.config.vocab_size, seed, swap)
        right, loss = 0, 0.0
        for part in tokens.split(max(1, RECALL_TOKENS // tokens.shape[1])):
            logits, _, _ = read_logits(model, part, model.init_state(len(part)), slice(-5, -1))
            wanted = part[:, -4:]
            right += int((logits.argmax(-1) == wanted).sum())
            loss += F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum").item()
        count = 4 * config.recall_rows
        results.append({"windows": windows, "accuracy": right / count, "loss": loss / count})
    return results


def plant(stream: Tensor, windows: int, config: Config, vocabulary: int, seed: int, swap: bool
          ) -> Tensor:
    """Rows of text with a string in it twice, so many windows apart: (recall_rows, T).

    The first string stands whole in the first window, the second whole in the last.
    """
    n, W = config.recall_rows, config.window
    length = windows * W
    check_memory(3 * 8 * n * (length + W), "recall_rows")
    draw = np.random.default_rng([windows, 17, seed])
    planted = torch.from_numpy(draw.integers(0, vocabulary, (n, 8)))
    starts = draw.integers(0, len(stream) - length, n)
    text = torch.stack([stream[start : start + length] for start in starts])  # (n, length)
    parts = [
        text[:, : W // 2 - 4],
        planted.roll(1, 0) if swap else planted,
        text[:, W // 2 + 4 :],
        stream[: W // 2 - 4].expand(n, -1),
        planted,
    ]
    return torch.cat(parts, dim=1).to(device())


RARE = 1e-4  # a rare word is less than that share of the words of training
TOPIC_TEMPERATURE = 0.8


def long_words(text: str) -> list[str]:
    """Words of four letters and more, in lower case."""
    return re.findall(r"[^\W\d_]{4,}", text.lower())


def rare_words(text: str, counts: collections.Counter, total: int) -> set[str]:
    """The words of a text that training, of `total` words with these counts, seldom has."""
    return {word for word in long_words(text) if counts[word] < RARE * total}


def topic_consistency(model: EDMForCausalLM, corpus: dnc_gpt2.Corpus, tokenizer: object,
                      config: Config) -> dict:
    """The share of a prompt's rare words that return in a sampled continuation, once the prompt has
    left the window; and of another prompt's, which is what chance gives. Prompts of one window from
    validation, four windows of continuation, the same random numbers for every arm."""
    n, W = config.topic_rows, config.window
    text = tokenizer.decode(corpus.train[:300_000].tolist())
    counts = collections.Counter(long_words(text))
    total = counts.total()
    starts = torch.linspace(0, len(corpus.valid) - W - 1, n).long()
    prompts = torch.stack([corpus.valid[start : start + W] for start in starts])  # (n, W)
    sampled = sample_rows(model, prompts, 4 * W)  # (n, 4 * W)

    rare = [rare_words(tokenizer.decode(row.tolist()), counts, total) for row in prompts]
    said = [rare_words(tokenizer.decode(row.tolist()), counts, total) for row in sampled[:, W:]]
    own, other = [], []
    for i in range(n):
        for j in range(n):
            if rare[i]:
                shares = own if i == j else other
                shares.append(len(rare[i] & said[j]) / len(rare[i]))
    return {
        "own": sum(own) / max(1, len(own)),
        "other": sum(other) / max(1, len(other)),
        "words": sum(len(words) for words in rare),
    }


@torch.no_grad()
def sample_rows(model: EDMForCausalLM, prompts: Tensor, count: int) -> Tensor:
    """Sample so many tokens behind prompts (n, T), as in generation -> (n, count)."""
    from tqdm import tqdm

    stride = model.config.stride
    model.config.stride = max(1, model.config.window // 2)
    draw = torch.Generator().manual_seed(11)
    state = model.init_state(len(prompts))
    tokens, sampled = prompts, []
    for _ in tqdm(range(count), desc="topic", leave=False, dynamic_ncols=True):
        logits, state, _ = read_logits(model, tokens.to(device()), state, slice(-1, None))
        shares = (logits[:, 0].cpu() / TOPIC_TEMPERATURE).softmax(-1)  # (n, V)
        tokens = torch.multinomial(shares, 1, generator=draw)  # (n, 1)
        sampled.append(tokens)
    model.config.stride = stride
    return torch.cat(sampled, dim=1)


# ══ Comparison ═══════════════════════════════════════════════════════════════════════════════════
def measure(model: EDMForCausalLM, corpus: dnc_gpt2.Corpus, tokenizer: object, config: Config,
            arm: str, seed: int) -> dict:
    """Everything that is reported of one arm and seed. Distances are in windows of Config, whatever
    the window of the model, so that the base with a longer one stands in the same rows."""
    run = {"arm": arm, "seed": seed, "window": model.config.window, **count_weights(model)}
    for split, stream in (("valid", corpus.valid), ("test", corpus.test)):
        if config.eval_tokens:
            stream = stream[: config.eval_tokens + 1]
        began = time.perf_counter()
        nll = evaluate(model, stream, config.eval_rows)
        seconds = time.perf_counter() - began
        scored = evaluation_rows(stream, config.eval_rows)[1] != -100  # (rows, L)
        count = int(scored.sum())
        run[f"{split}_loss"] = float(nll.sum()) / count
        run[f"{split}_tokens"] = count
        if split == "valid":
            run["tokens_per_s"] = count / seconds
            back = windows_back(stream, config.eval_rows, config.window)
            run["by_distance"] = by_distance(nll, back, scored)
            run["recall"] = planted_recall(model, stream, config, seed)
            if config.topic_rows:
                run["topic"] = topic_consistency(model, corpus, tokenizer, config)
            if any(FLAGS.get(arm, ())):
                run |= measure_swapped(model, stream, back, scored, config, seed)
    return run


def count_weights(model: EDMForCausalLM) -> dict[str, int]:
    """How many parameters a model has, those of 4 bits too, and how many of them are trained."""
    whole = trained = 0
    for weight in model.parameters():
        packed = getattr(weight, "quant_state", None)  # of bitsandbytes: the shape that it had
        whole += weight.numel() if packed is None else math.prod(packed.shape)
        trained += weight.numel() if weight.requires_grad else 0
    return {"parameters": whole, "trained_parameters": trained}


def measure_swapped(model: EDMForCausalLM, stream: Tensor, back: np.ndarray, scored: Tensor,
                    config: Config, seed: int) -> dict:
    """Loss, by distance too, and recall over a stream with another row's memory; arguments as of
    by_distance."""
    nll = evaluate(model, stream, config.eval_rows, swap=True)
    return {
        "swapped_loss": float(nll.sum()) / int(scored.sum()),
        "swapped_by_distance": by_distance(nll, back, scored),
        "recall_swapped": planted_recall(model, stream, config, seed, swap=True),
    }


def runs_by_arm(runs: list[dict], config: Config) -> dict[str, list[dict]]:
    """The runs of each arm, one a seed, in the order of the tables; no full window where the base
    has none that is longer."""
    seeds = {"base": [0], "full": [0]} | {arm: config.seed_list for arm in config.arm_list}
    arms = {arm: [run for run in runs if run["arm"] == arm and run["seed"] in seeds[arm]]
            for arm in ("base", *config.arm_list, "full")}
    return {arm: of_arm for arm, of_arm in arms.items() if of_arm}


def print_tables(runs: list[dict], base: Base, corpus: dnc_gpt2.Corpus, config: Config) -> None:
    """Print what was measured: perplexity, by distance, recall, topic."""
    arms = runs_by_arm(runs, config)
    short = arms["base"][0]
    print()
    print_heading(f"{base.name}, frozen, window {config.window}: what do memories add?")
    print(f"  {corpus.name}; {short['valid_tokens']:,} tokens of validation, "
          f"{short['test_tokens']:,} of test\n")
    print_perplexity(arms, gap_note(base, config))
    print_by_distance(arms)
    if short["recall"]:
        print_recall(arms)
    if "topic" in short:
        print_topic(arms)
    seeds = len(config.seed_list)
    print(LINE)
    print(f"  ±: half of the 95 % interval over {seeds} seeds." if seeds > 1 else
          "  One seed: no interval. --seeds 0,1,2 gives one.")


def print_perplexity(arms: dict[str, list[dict]], gap_is: str) -> None:
    """Print a row of perplexities for each arm, and what the gap is."""
    [short] = arms["base"]
    names = {arm: f"base, window {arms[arm][0]['window']}" for arm in ("base", "full")
             if arm in arms}
    gap = 0.0
    if "full" in arms:
        gap = short["valid_loss"] - arms["full"][0]["valid_loss"]
    print(f"  {'Perplexity ↓':<22}{'validation':>15}{'swapped':>15}{'test':>15}{'of the gap':>15}"
          f"{'tokens/s':>10}\n{LINE}")
    for arm, runs in arms.items():
        row = cell([perplexity(run["valid_loss"]) for run in runs], ",.2f", 15)
        swapped = [run["swapped_loss"] for run in runs if "swapped_loss" in run]
        row += cell([perplexity(loss) for loss in swapped], ",.2f", 15)
        row += cell([perplexity(run["test_loss"]) for run in runs], ",.2f", 15)
        if arm in names or gap <= 0:
            row += cell(None, "", 15)
        else:
            closed = [100 * ((short["valid_loss"] - run["valid_loss"]) / gap) for run in runs]
            row += cell(closed, ".0f", 13) + " %"
        print(f"  {names.get(arm, arm):<22}{row}{runs[0]['tokens_per_s']:>10,.0f}")
    print(f"{LINE}\n  swapped: every row is scored with the memory of the row before it. Of the\n"
          f"  gap: {gap_is}.")


def gap_note(base: Base, config: Config) -> str:
    """What the column "of the gap" says, or why it says nothing."""
    full, positions = full_window(base, config), base.settings().max_position_embeddings
    if not full:
        return "not known, as the base has no longer window to compare with"
    note = f"the share of the difference to the base at a window of {full}"
    if full < positions:
        note += f", as many of\n  its {positions:,} positions as --full_window says"
    return note


def print_by_distance(arms: dict[str, list[dict]]) -> None:
    """Print perplexity for each distance to the last use of a token, and what the row's own memory
    has to do with it."""
    print()
    print_heading("Validation perplexity by distance to the last use of the same token")
    buckets = [i for i, row in enumerate(arms["base"][0]["by_distance"]) if row["tokens"]]
    print_buckets(arms, buckets, lambda run, i: perplexity(run["by_distance"][i]["loss"]), ",.1f")
    with_memory = {arm: runs for arm, runs in arms.items() if "swapped_by_distance" in runs[0]}
    if with_memory:
        print()
        print_heading("Nats a token that are lost with the memory of another row")
        print_buckets(with_memory, buckets, lost_nats, ".3f")


def lost_nats(run: dict, bucket: int) -> float:
    """How much worse a bucket of tokens is with the memory of another row."""
    own, other = (run[name][bucket]["loss"] for name in ("by_distance", "swapped_by_distance"))
    return other - own


def print_buckets(arms: dict[str, list[dict]], buckets: list[int],
                  figure: Callable[[dict, int], float], form: str) -> None:
    """Print a row for each bucket of distances: figure(run, bucket) of every arm over its seeds."""
    print(f"  {'windows back':<15}{'tokens':>9}" + "".join(f"{arm:>15}" for arm in arms))
    rows = next(iter(arms.values()))[0]["by_distance"]
    for i in buckets:
        cells = [cell([figure(run, i) for run in runs], form, 15) for runs in arms.values()]
        print(f"  {rows[i]['windows_back']:<15}{rows[i]['tokens']:>9,}" + "".join(cells))


def print_recall(arms: dict[str, list[dict]]) -> None:
    """Print the recall of a planted string for each distance."""
    print()
    print_heading("Recall of a planted random string: its last four tokens")
    print(f"  {'windows back':<24}" + "".join(f"{arm:>15}" for arm in arms))
    for key, factor, form, unit in (("accuracy", 100, ".1f", "% right"),
                                    ("loss", 1, ".2f", "nats")):
        for i, row in enumerate(arms["base"][0]["recall"]):
            values = [[factor * run["recall"][i][key] for run in runs] for runs in arms.values()]
            cells = [cell(of_arm, form, 15) for of_arm in values]
            print(f"  {row['windows']:<15}{unit:<9}" + "".join(cells))


def print_topic(arms: dict[str, list[dict]]) -> None:
    """Print how many rare words of its own prompt, and of another, an arm comes back to."""
    print()
    print_heading("Topic: % of a prompt's rare words that return when it has left the window")
    print(f"  {'':<24}" + "".join(f"{arm:>15}" for arm in arms))
    for name, key in (("its own prompt's", "own"), ("another prompt's", "other")):
        values = [[100 * run["topic"][key] for run in runs] for runs in arms.values()]
        print(f"  {name:<24}" + "".join(cell(of_arm, ".1f", 15) for of_arm in values))


def plot_runs(runs: list[dict], config: Config) -> None:
    """Draw plots/edm_gpt2.png: perplexity and recall against distance."""
    arms = runs_by_arm(runs, config)
    names = ("base", "recurrent", "edm", "both", "full", "adapters")
    colors = dict(zip(names, PALETTE, strict=False))
    styles = {}
    for arm, of_arm in arms.items():
        label = f"base, window {of_arm[0]['window']}" if arm in ("base", "full") else arm
        styles[arm] = {"color": colors[arm], "marker": "o", "ms": 4, "label": label}
    panels = [plot_distances, plot_recall] if config.recall_rows else [plot_distances]
    path = Path(config.plot_dir) / "edm_gpt2.png"
    with dark_figure(path, 1, len(panels), (6 * len(panels), 4.8)) as (_, axes):
        for plot, axis in zip(panels, np.atleast_1d(axes), strict=True):
            plot(axis, arms, styles)
            axis.grid(alpha=0.2)


def plot_distances(axis: object, arms: dict[str, list[dict]], styles: dict[str, dict]) -> None:
    """Draw the perplexity of each arm against the distance to the last use of a token."""
    names = [row["windows_back"] for row in arms["base"][0]["by_distance"] if row["tokens"]]
    for arm, of_arm in arms.items():
        losses = np.array([[row["loss"] for row in run["by_distance"] if row["tokens"]]
                           for run in of_arm])
        axis.plot(range(len(names)), np.exp(np.minimum(losses, 700)).mean(0), **styles[arm])
    axis.set(yscale="log", ylabel="perplexity", xlabel="windows back",
             title="Perplexity by last use of a token")
    axis.set_xticks(range(len(names)), names, rotation=30, fontsize=8)
    axis.legend(fontsize=8)


def plot_recall(axis: object, arms: dict[str, list[dict]], styles: dict[str, dict]) -> None:
    """Draw the loss of a planted string for each arm against the distance to its first use."""
    for arm, of_arm in arms.items():
        losses = np.array([[row["loss"] for row in run["recall"]] for run in of_arm])
        axis.plot([row["windows"] for row in of_arm[0]["recall"]], losses.mean(0), **styles[arm])
    distances = [row["windows"] for row in arms["base"][0]["recall"]]
    axis.set_xscale("log", base=2)
    axis.set_xticks(distances, map(str, distances))
    axis.set(ylabel="loss (nats / token)", xlabel="windows back",
             title="Recall of a planted random string")


# ══ Saving and generating ════════════════════════════════════════════════════════════════════════
def save_model(model: EDMForCausalLM, base: Base, folder: Path) -> None:
    """Write a folder that from_pretrained and AutoModelForCausalLM load, without this repository:
    weights, configuration, tokenizer, code and SUMS. In generation the window leaves by halves.
    Raises ValueError where it cannot be written; what was there is then as it was."""
    new = folder / NEW

    blocks = model.config.stride
    model.config.stride = max(1, model.config.window // 2)
    name = f"edm_model.{type(model).__name__}"
    model.config.auto_map = {
        "AutoConfig": f"edm_model.{type(model.config).__name__}",
        "AutoModel": name,  # with its head: there is none without
        "AutoModelForCausalLM": name,
    }
    transformers.utils.logging.disable_progress_bar()
    tokenizer = give_end_token(model, base)
    try:
        with growing(folder):
            shutil.rmtree(new, ignore_errors=True)  # of a run that was killed
            model.save_pretrained(new)
            tokenizer.save_pretrained(new)
            write_text(standalone_source(Path(edm_model.__file__)), new / "edm_model.py")
            sums = [f"{file_sha(path)}  {path.name}\n" for path in sorted(new.iterdir())]
            write_text("".join(sums), new / SUMS)
            finish_save(folder)
    finally:
        if not (new / SUMS).is_file():  # else the next reader moves the rest
            shutil.rmtree(new, ignore_errors=True)
    model.config.stride = blocks


def end_token(base: Base) -> str:
    """The token that ends a text: of Llama's family the base's own, else that of dnc_gpt2.py."""
    own = base.config.get("eos_token_id")
    if isinstance(own, list):
        own = own[0]
    if own is None or base.kind() is EDMGPT2ForCausalLM:
        return dnc_gpt2.END
    return base.tokenizer.id_to_token(own) or dnc_gpt2.END


def give_end_token(model: EDMForCausalLM, base: Base) -> PreTrainedTokenizerFast:
    """The base's tokenizer for transformers, with a token that begins, ends and pads; a model whose
    vocabulary lacked it gets a row for it."""
    embedding, end = model.decoder.embedding, end_token(base)
    tokenizer, weight = with_end_token(base.tokenizer, embedding.weight.detach(), end)
    if len(weight) > embedding.num_embeddings:
        embedding.weight = nn.Parameter(weight, requires_grad=False)
        embedding.num_embeddings = len(weight)
        if model.lm_head is not None:
            _, weight = with_end_token(base.tokenizer, model.lm_head.weight.detach(), end)
            model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
            model.lm_head.out_features = len(weight)
        model.config.base = model.config.base | {"vocab_size": len(weight)}
        model.config.vocab_size = len(weight)
    for settings in (model.config, model.generation_config):
        settings.bos_token_id = tokenizer.bos_token_id
        settings.eos_token_id = tokenizer.eos_token_id
        settings.pad_token_id = tokenizer.pad_token_id
    return tokenizer


NEW, SUMS = ".new", "sha256.txt"  # `sha256sum -c sha256.txt` checks a saved folder


def finish_save(folder: Path) -> None:
    """Move what a save has written whole to where it belongs, SUMS last: also that of a process
    which was killed on the way."""
    new = folder / NEW
    if not (new / SUMS).is_file():
        return
    for path in sorted(new.iterdir(), key=lambda path: path.name == SUMS):
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(path, folder / path.name)
    new.rmdir()


def check_sums(folder: Path) -> None:
    """Raise ValueError, naming the file, where one of a saved folder is not what SUMS says. Older
    folders have none."""
    finish_save(folder)
    sums, remedy = folder / SUMS, "train again, or name another --save_dir"
    if not os.path.lexists(sums):
        return
    check_file(sums, remedy)
    with reading(sums, remedy):
        lines = sums.read_bytes().decode().removesuffix("\n").split("\n")
        wanted = {line[66:]: line[:64] for line in lines}
        is_whole = all(name == Path(name).name for name in wanted)
        is_whole &= {"config.json", "model.safetensors", "tokenizer.json"} <= wanted.keys()
        require(is_whole and all(line[64:66] == "  " for line in lines), "file", str(sums),
                f"the digests of a saved folder; {remedy}")
    for name, digest in wanted.items():
        check_file(folder / name, remedy)
        if file_sha(folder / name) != digest:
            raise ValueError(f"{folder / name}: truncated or altered, its sha256 is another; "
                             f"{remedy}")


def save_memory(state: EDMGPT2State, model: EDMForCausalLM, path: str | Path) -> None:
    """Write a state, whole or not at all: a notebook outlives the process. Raises ValueError where
    it cannot be written."""
    save_tensors(pack_memory(state, model), Path(path), "name another --memory_file")


def load_memory(model: EDMForCausalLM, path: str | Path) -> EDMGPT2State:
    """Read what save_memory wrote. Raises ValueError for a file that is damaged or of another
    model."""
    payload = load_tensors(Path(path), ("model", "sha256", "state"),
                           "delete it, or name another --memory_file", str(device()))
    try:
        return unpack_memory(payload, model)
    except ValueError as error:
        raise ValueError(f"memory_file = {str(path)!r}: {error}; delete it, or name another"
                         ) from None


class Stream:
    """The text of tokens as they come."""

    def __init__(self, tokenizer: object) -> None:
        self.tokenizer, self.said = tokenizer, []
        self.begin = self.shown = 0  # said[begin:shown] is what the next piece is decoded behind

    def piece(self, token: int) -> str:
        """What a token adds to the text; "" within a character of several tokens."""
        self.said.append(token)
        text = self.rest()
        is_part = text.endswith("\ufffd") and len(self.said) - self.shown < 4  # bytes of it
        if is_part or not text:
            return ""
        self.begin, self.shown = self.shown, len(self.said)
        return text

    def rest(self) -> str:
        """What was said and is in no piece yet."""
        before = self.tokenizer.decode(self.said[self.begin : self.shown])
        return self.tokenizer.decode(self.said[self.begin :])[len(before) :]


@torch.no_grad()
def continue_text(model: EDMForCausalLM, tokenizer: object, prompt: str, config: Config,
                  state: EDMGPT2State | None = None, stop: StopSignal | None = None,
                  keep: Callable[[EDMGPT2State], None] = lambda state: None) -> EDMGPT2State:
    """Stream a continuation, then print for each of its tokens the earlier tokens that it recalled
    most. A signal to stop ends it behind a token. keep gets the state of all that was printed, then
    too. The prompt is tokenized by line, as the text that the memories were trained on."""
    ids = encode_text(tokenizer, prompt)
    require(len(ids) > 0, "generate" if config.generate else "text", prompt,
            "text that the tokenizer knows")
    print()
    print_heading(f"{prompt!r} goes on")
    tokens = torch.tensor([ids], device=device())
    read = read_logits(model, tokens, state or model.init_state(1), slice(-1, None))
    stop = stop or StopSignal()
    with stop.held():
        print(prompt, end="", flush=True)
        recalls, state = write_on(model, tokenizer, read, config, stop)
        keep(state)

    if any(recall for _, recall in recalls):
        print("  token         recalled (windows back, weight)")
        for token, recall in recalls:
            print(f"  {tokenizer.decode([token])!r:<14}{recall}")
    return state


def write_on(model: EDMForCausalLM, tokenizer: object, read: tuple, config: Config,
             stop: StopSignal) -> tuple[list[tuple[int, str]], EDMGPT2State]:
    """Stream tokens behind what read_logits read, until there are enough or a signal has come ->
    each with what it recalled, and the state behind the last."""
    draw = torch.Generator().manual_seed(config.seed_list[0])
    stream, recalls = Stream(tokenizer), []
    logits, state, passes = read
    while len(recalls) < config.new_tokens and not stop.signum:
        token = pick_token(logits[0, 0].cpu(), config.temperature, draw)
        recalls.append((token, recalled(passes[-1], state, tokenizer)))
        print(stream.piece(token), end="", flush=True)
        tokens = torch.tensor([[token]], device=device())
        logits, state, passes = read_logits(model, tokens, state, slice(-1, None))
    print(f"{stream.rest()}\n")
    return recalls, state


def recalled(last: Pass, state: EDMGPT2State, tokenizer: object, count: int = 3) -> str:
    """The tokens that the last token of a pass read most, over all heads; "" where it read none."""
    if last.slots is None or not last.slots.shape[-1]:
        return ""
    slots, weights = last.slots[0, :, -1], last.weights[0, :, -1]  # (H, K)
    total = torch.zeros(state.memory.token.shape[1], device=slots.device)  # (N,)
    total.scatter_add_(0, slots.flatten(), weights.flatten() / len(slots))
    now = int(state.start[0] + state.fill[0])
    W = state.tokens.shape[1] - 1
    parts = []
    best = total.topk(min(count, len(total)))
    for weight, slot in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        if weight > 0:
            word = tokenizer.decode([int(state.memory.token[0, slot])])
            back = (now - int(state.memory.position[0, slot])) / W
            parts.append(f"{word!r} ({back:.1f}, {weight:.2f})")
    return "  ".join(parts)


# ══ Main ═════════════════════════════════════════════════════════════════════════════════════════
def run_generation(config: Config, stop: StopSignal) -> None:
    """--generate: continue a prompt with the model in save_dir; one process a memory_file."""
    if not config.memory_file:
        generate(config, stop)
        return
    memory = Path(config.memory_file)
    check_folder(memory.parent, "memory_file")
    with locked(memory.parent, "memory_file", f".{memory.name}.lock"):
        generate(config, stop)


def kind_of_folder(folder: Path) -> type[EDMForCausalLM]:
    """The model that a saved folder holds."""
    name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    return EDMForCausalLM if name == EDMConfig.model_type else EDMGPT2ForCausalLM


def load_saved(config: Config) -> tuple[EDMForCausalLM, object]:
    """The model in save_dir and its tokenizer. Raises ValueError where it is damaged or absent."""
    from tokenizers import Tokenizer

    folder = Path(config.save_dir)
    check_sums(folder)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        require_field(config, "save_dir", (folder / name).is_file(),
                      "a folder that a run of edm_gpt2.py wrote; train one first")
    with reading(folder, "train again, or name another --save_dir"):
        kind = kind_of_folder(folder)
        settings = kind.config_class.from_pretrained(folder)
        settings.check()
        check_memory(model_bytes(settings, rows=1), "slots, or name another --save_dir")
        model = kind.from_pretrained(folder).eval().to(device())
        return model, Tokenizer.from_file(str(folder / "tokenizer.json"))


def generate(config: Config, stop: StopSignal) -> None:
    """As run_generation. What was said until a signal is in memory_file too."""
    model, tokenizer = load_saved(config)
    state = None
    if config.memory_file and Path(config.memory_file).exists():
        state = load_memory(model, config.memory_file)

    def keep(state: EDMGPT2State) -> None:
        if config.memory_file:
            save_memory(state, model, config.memory_file)

    continue_text(model, tokenizer, config.generate, config, state, stop, keep)
    if config.memory_file:
        print(f"\nwrote {config.memory_file}")


def load_text(base: Base, config: Config) -> dnc_gpt2.Corpus:
    """The corpus in tokens of the base."""
    with tempfile.TemporaryDirectory() as folder:
        with growing(Path(folder)):
            PreTrainedTokenizerFast(tokenizer_object=base.tokenizer).save_pretrained(folder)
        corpus = load_corpus(dnc_gpt2.Config(
            dataset=config.dataset, tokenizer=folder, batch_size=config.batch_size,
            bptt_segments=config.bptt_segments, seq_len=config.window, eval_rows=config.eval_rows))
    name = corpus.name.replace(f"{Path(folder).name} tokenizer", "the base's tokenizer")
    return corpus._replace(name=name)


def print_start(base: Base, corpus: dnc_gpt2.Corpus, config: Config) -> None:
    """Print what is compared, and on what."""
    decoder = base.settings()
    kind = {"gpt2": "GPT-2"}.get(decoder.model_type, decoder.model_type)
    positions = decoder.max_position_embeddings
    lines = {
        "base": f"{base.name}: {decoder.num_hidden_layers} blocks of width "
                f"{decoder.hidden_size}, {positions} positions, vocabulary "
                f"{decoder.vocab_size:,}; frozen",
        "corpus": corpus.name,
        "device": device_name(device()),
    }
    if base.origin and base.origin.split(",")[0] != corpus.name.split(",")[0]:
        lines["note"] = f"the base was trained on {base.origin}"
    if not full_window(base, config):
        remedy = ("a lower --window, or another --base, leaves one"
                  if positions <= config.window else "a higher --full_window leaves one")
        lines["compared"] = (f"the arms with the base at {config.window} tokens; not with a longer "
                             f"window of the base: {remedy}")
    print_banner(f"A frozen {kind}, with and without a memory for what has left its window", lines,
                 config)


def full_window(base: Base, config: Config) -> int:
    """The longer window at which the base is measured too; 0 where it has none."""
    longest = min(base.settings().max_position_embeddings, config.full_window)
    return longest if longest > config.window else 0


def measure_base(base: Base, corpus: dnc_gpt2.Corpus, config: Config, runs: list[dict]) -> None:
    """Add the runs of the base that are not there: at the window, and at its full window if that
    is longer."""
    windows = {"base": config.window, "full": full_window(base, config)}
    for arm, window in windows.items():
        if window and find_run(runs, arm, seed=0) is None:
            wide = dataclasses.replace(config, window=window, slots=max(config.slots, window))
            model = build_model(base, wide, "base", seed=0).eval()
            runs.append(measure(model, corpus, base.tokenizer, config, arm, seed=0))


def ask_hub_once() -> None:
    """Spare the hub's libraries their retries where the hub does not answer."""
    if not hub_reachable():  # what it sets is read at import, which is over
        import huggingface_hub

        huggingface_hub.constants.HF_HUB_OFFLINE = True


def train_and_measure(base: Base, corpus: dnc_gpt2.Corpus, config: Config, log: "Measurements"
                      ) -> None:
    """Train and measure every arm and seed that the log has not yet; the last arm of the first seed
    is saved."""
    for seed in config.seed_list:
        for arm in config.arm_list:
            if log.has(arm, seed):
                print(f"  {arm}, seed {seed}: measured before", flush=True)
                continue
            model, rows, speed = train_arm(base, corpus, config, arm, seed)
            run = measure(model, corpus, base.tokenizer, config, arm, seed)
            if (arm, seed) == (config.arm_list[-1], config.seed_list[0]):
                save_model(model, base, Path(config.save_dir))
                log.saved = saved_as(config)
            log.add(run | {"training_tokens_per_s": speed}, rows)
            log.write()  # what the next one may not be
            ppl, of_base = (perplexity(r["valid_loss"]) for r in (run, log.runs[0]))
            print(f"  {arm}, seed {seed}: validation perplexity {ppl:.2f}, base {of_base:.2f}",
                  flush=True)


def find_run(runs: list[dict], arm: str, seed: int) -> dict | None:
    """The run of an arm and seed, None where there is none."""
    return next((run for run in runs if (run["arm"], run["seed"]) == (arm, seed)), None)


def run_comparison(config: Config) -> None:
    """The main job: base, corpus, every arm and seed; then tables, plot, continuation."""
    check_folder(config.save_dir, "save_dir", 64)
    check_folder(config.plot_dir, "plot_dir", 1)
    with (locked(config.save_dir, "save_dir"),
          locked(config.plot_dir, "plot_dir", ".edm_gpt2.lock")):
        compare_arms(config)


def compare_arms(config: Config) -> None:
    """`run_comparison` in folders that can be written."""
    ask_hub_once()
    base = load_base(config)
    corpus = load_text(base, config)
    print_start(base, corpus, config)

    log = Measurements.begin(base, corpus, config)
    measure_base(base, corpus, config, log.runs)
    if not log.replaces:  # else what is there stays until an arm is measured
        log.write()
    train_and_measure(base, corpus, config, log)
    print_tables(log.runs, base, corpus, config)
    plot_runs(log.runs, config)
    model, tokenizer = load_saved(config)
    continue_text(model, tokenizer, config.text, config)
    print(f"\nwrote {log.path}, {log.path.with_suffix('.png')}, {Path(config.save_dir)}/")


# ══ Measurements: a file that a stopped run goes on from ═════════════════════════════════════════
# Fields that the figures of one run do not depend on.
FREE = {"arms", "seeds", "resume", "base", "base_dir", "dataset", "save_dir", "plot_dir",
        "log_every_steps", "text", "generate", "new_tokens", "temperature", "memory_file"}


@dataclasses.dataclass
class Measurements:
    """plots/edm_gpt2.json: where it comes from, every run and its training."""
    path: Path
    about: dict
    runs: list[dict]
    history: list[dict]  # losses of training, a row every log_every_steps
    saved: dict | None  # what save_dir holds, as saved_as() has it
    replaces: bool = False  # the file has runs that are not kept
    again: tuple[str, int] | None = None  # of runs the arm and seed to train for save_dir

    @classmethod
    def begin(cls, base: Base, corpus: dnc_gpt2.Corpus, config: Config) -> "Measurements":
        """An empty one; with --resume what the file has of the same settings. Raises ValueError
        where it is damaged, or --resume auto would replace another run's files."""
        path = Path(config.plot_dir) / "edm_gpt2.json"
        about = {"base": base.name, "corpus": corpus.name, "config": dataclasses.asdict(config),
                 "identity": identity(base, corpus, config)} | run_facts(device_name(device()))
        log = cls(path, about, [], [], None)
        remedy = "delete it, or run without --resume" if config.resume else "it is replaced"
        try:
            content = read_json(path, remedy)
            with reading(path, remedy):
                log.take_over(content, config)
        except ValueError as problem:
            if config.resume:
                raise
            print(f"plot_dir: {problem}", flush=True)
            log.replaces = True
        return log

    def take_over(self, content: dict, config: Config) -> None:
        """Keep the runs of a file with --resume, if they are of the same settings, base and text.
        One line says what will be replaced. Raises OtherRun where --resume auto would do that."""
        other = self.other_run(content, config)
        self.replaces = bool(content and (other or not config.resume))
        if other and config.resume == "auto":
            raise OtherRun(f"{other} another save_dir and plot_dir, or --resume anew to train and "
                           "measure over it")
        if other:
            print("save_dir, plot_dir: files of the same names are replaced. There is another run: "
                  f"{other.split(';')[0]}", flush=True)
        elif not content and config.resume:
            print(f"resume: {self.path} is not there; from the start", flush=True)
        elif content and config.resume:
            self.keep(content, config)
        elif content:
            print(f"plot_dir: {self.path} has {len(content['runs'])} runs of these settings, which "
                  "are replaced (--resume auto keeps them)", flush=True)

    def other_run(self, content: dict, config: Config) -> str:
        """What the files that are there are of, and what to do, up to an "or"; "" where there are
        none or they are of these settings, base and text."""
        if not content:
            model = Path(config.save_dir) / "model.safetensors"
            known = f"{model}: of a run that {self.path} does not have; name its plot_dir, or"
            return known if model.exists() else ""
        old, this = content["about"], self.about
        if old.get("identity") == this["identity"]:
            return ""
        for name, value in this["config"].items():
            saved = old["config"].get(name)
            if name not in FREE and saved != value:
                known = f"set --{name} {shlex.quote(str(saved))}, or"
                return (f"{self.path}: was measured with {name} = {saved!r}, this run has "
                        f"{value!r}; {known if name in old['config'] else 'name'}")
        named = [f"{about['base']} on {about['corpus']}" for about in (old, this)]
        if named[0] == named[1]:
            return f"{self.path}: of other weights of the base or another text; bring those, or"
        return f"{self.path}: of {named[0]}, this is {named[1]}; name those, or"

    def keep(self, content: dict, config: Config) -> None:
        """Keep the runs of a file. That of which save_dir is to hold the model, and does not, is
        trained once more."""
        self.runs, self.history, self.saved = (content[name] for name in
                                               ("runs", "history", "saved"))
        measured = [(run["arm"], run["seed"]) for run in self.runs]
        if saved_as(config) != self.saved:
            self.again = (config.arm_list[-1], config.seed_list[0])
            measured = [which for which in measured if which != self.again]
            if saved_as(config):
                arm, seed = self.again
                print(f"save_dir: its model is replaced when {arm}, seed {seed}, is trained")
        print(f"resume: {len(measured)} runs of {self.path}", flush=True)

    def has(self, arm: str, seed: int) -> bool:
        """Whether an arm and seed need not be trained."""
        return find_run(self.runs, arm, seed) is not None and (arm, seed) != self.again

    def add(self, run: dict, rows: list[dict]) -> None:
        """Add a run and its training, in place of an older one of the same arm and seed."""
        this = (run["arm"], run["seed"])
        self.runs = [old for old in self.runs if (old["arm"], old["seed"]) != this] + [run]
        kept = [row for row in self.history if (row["arm"], row["seed"]) != this]
        self.history = kept + rows

    def write(self) -> None:
        """Write the file, whole or not at all."""
        write_json({"about": self.about, "runs": self.runs, "history": self.history,
                    "saved": self.saved}, self.path)


def saved_as(config: Config) -> dict | None:
    """Which arm and seed save_dir is to hold, and the digest of its digests; None where it holds
    nothing."""
    sums = Path(config.save_dir) / SUMS
    if not sums.is_file():
        return None
    return {"arm": config.arm_list[-1], "seed": config.seed_list[0], "sha256": file_sha(sums)}


def identity(base: Base, corpus: dnc_gpt2.Corpus, config: Config) -> str:
    """A digest of all that the figures of a run depend on, beside its arm and seed."""
    settings = {name: value for name, value in vars(config).items() if name not in FREE}
    described = json.dumps([settings, base.config, corpus.fingerprint], sort_keys=True)
    digest = hashlib.sha256(described.encode())
    weights = [weight for _, weight in sorted(base.weights.items())]
    if base.head is not None:
        weights.append(base.head)
    for weight in weights:
        digest.update(weight.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def farewell(argv: list[str]) -> dict:
    """What a command line says where it is stopped, as run_command takes it."""
    again = [Path(__file__).name, *argv]
    if not asks_for(argv, "generate"):
        again += [] if asks_for(argv, "resume") else ["--resume", "auto"]
        return {"again": again, "saved": "every arm that was measured, and the training of a base, "
                "is saved"}
    if asks_for(argv, "memory_file"):
        return {"again": again, "saved": "memory_file holds the text until here",
                "go_on": "go on behind it with"}
    return {"again": again, "saved": "nothing to save", "go_on": "run it again with"}


def main(argv: list[str]) -> int:
    """Run a command line -> exit code, as run_command gives them."""

    def job(stop: StopSignal) -> None:
        config = read_config(Config, argv, __doc__)
        check_commands(config, argv, ("generate", "resume"))
        is_file = config.memory_file.strip() != "" or not asks_for(argv, "memory_file")
        require_field(config, "memory_file", is_file, "a file; leave it out to keep no notebook")
        if config.generate:
            run_generation(config, stop)
        else:
            run_comparison(config)

    return run_command(job, sizes=SIZES, **farewell(argv))


if __name__ == "__main__":
    print_any_character()
    sys.exit(main(sys.argv[1:]))

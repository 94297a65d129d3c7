#!/usr/bin/env python3
"""What of transformers, peft and lm-eval works with the models that this project saves: one table.

    python benchmarks/huggingface.py [--json FILE]

A tiny model of every kind (the DNC; EDM on GPT-2, Llama, Mistral, Qwen2, Qwen3 and Gemma), whose
memories speak, is saved as its script saves it, loaded by AutoModelForCausalLM with the folder's
own code, and put through everything that people do with such a model. Each use is compared with a
pass over all tokens from an empty memory, which knows neither cache nor generate(). A cell says
`yes` (it equals the reference), `refused` (one sentence, ValueError), `-` (the package is not
installed) or the error. Exit code 1 where one is an error. CPU, a minute a kind.
"""

import argparse
import importlib.util
import json
import os
import pickle
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # not this folder, whose kernels.py a package of that name would meet
SCRATCH = tempfile.TemporaryDirectory(prefix="huggingface-")
os.environ["HF_MODULES_CACHE"] = f"{SCRATCH.name}/modules"  # the folders' code, not the user's
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch  # noqa: E402
import transformers  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    TextIteratorStreamer,
    Trainer,
    TrainingArguments,
    pipeline,
)

import dnc_gpt2  # noqa: E402
import dnc_model as dm  # noqa: E402
import edm_gpt2 as eg  # noqa: E402

W = 16  # tokens of the window; prompts and answers are longer
KINDS = ("dnc", "gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma")


# ══ Tiny models of every kind, saved as their scripts save them ══════════════════════════════════
def make_tokenizer() -> object:
    """A byte-level BPE of 300 tokens, of this repository's README."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([(ROOT / "README.md").read_text(encoding="utf-8")], trainer)
    return tokenizer


def let_speak(model: torch.nn.Module) -> None:
    """Move every weight, and open the gates of memories, so that a mistake of theirs shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            if name.endswith(("alpha", "gate")):
                parameter.fill_(0.5)


def save_dnc(folder: Path, tokenizer: object) -> None:
    """A DNC, as --export writes one."""
    tokenizer, _ = dnc_gpt2.with_end_token(tokenizer, torch.zeros(300, 1), dnc_gpt2.END)
    base = {"vocab_size": 301, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": W,
            "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
            "bos_token_id": 300, "eos_token_id": 300}
    base = transformers.GPT2Config(**base).to_dict()
    config = dm.DNCGPT2Config(base=base, mem_slots=8, mem_width=8, num_reads=2, scan="eager",
                              bos_token_id=300, eos_token_id=300, pad_token_id=300)
    model = dm.DNCGPT2ForCausalLM(config)
    let_speak(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_edm(kind: str, folder: Path, tokenizer: object) -> None:
    """EDM on a base of a kind, as edm_gpt2.py writes it."""
    base, dropout = make_base(kind)
    config = eg.Config(window=W, slots=64, top_k=8, recurrent_width=8, batch_size=4,
                       bptt_segments=2, eval_rows=2, topic_rows=2)
    frozen = eg.Base(kind, base.config.to_dict() | dropout, base.base_model.state_dict(),
                     tokenizer, origin="")
    model = eg.build_model(frozen, config, "both", seed=0)
    let_speak(model)
    folder.mkdir()
    eg.save_model(model, frozen, folder)


def make_base(kind: str) -> tuple[torch.nn.Module, dict]:
    """A plain decoder, and the fields of its configuration that turn dropout off."""
    if kind == "gpt2":
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 4 * W}
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    else:
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                 "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None,
                 "max_position_embeddings": 4 * W, "tie_word_embeddings": True}
        shape |= {"qwen3": {"head_dim": 8}, "gemma": {"head_dim": 8},
                  "mistral": {"sliding_window": None}}.get(kind, {})
        dropout = {}
    settings = AutoConfig.for_model(kind, vocab_size=300, bos_token_id=None, eos_token_id=None,
                                    **shape)
    return AutoModelForCausalLM.from_config(settings), dropout


# ══ What people do with a model ══════════════════════════════════════════════════════════════════
class Case(NamedTuple):
    """A saved model, as a user has it."""
    folder: Path
    model: torch.nn.Module
    tokenizer: object

    def again(self, **options: object) -> torch.nn.Module:
        """A fresh one of the folder."""
        return load(self.folder, **options)

    def prompt(self, rows: int = 2, length: int = 2 * W + 5) -> Tensor:
        """Tokens (rows, length), longer than the window."""
        generator = torch.Generator().manual_seed(3)
        return torch.randint(1, 256, (rows, length), generator=generator)

    @torch.no_grad()
    def log_p(self, tokens: Tensor) -> Tensor:
        """The reference: log p (B, T, V) of one pass from an empty memory."""
        return self.model(tokens).logits.log_softmax(-1)

    def generate(self, tokens: Tensor, count: int = W + 3, **options: object) -> Tensor:
        """So many tokens more, the most likely ones unless options say otherwise."""
        return self.model.generate(tokens, max_new_tokens=count, min_new_tokens=count,
                                   **{"do_sample": False} | options)


def load(folder: Path, **options: object) -> torch.nn.Module:
    """The model of a folder, with the folder's own code."""
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def require_equal(got: Tensor, wanted: Tensor, tolerance: float = 0.0) -> None:
    """Raise AssertionError where two tensors differ."""
    assert got.shape == wanted.shape, f"shape {tuple(got.shape)} instead of {tuple(wanted.shape)}"
    far = (got.double() - wanted.double()).abs().max().item() if got.numel() else 0.0
    assert far <= tolerance, f"differs by {far:.2g}"


def require_greedy(case: Case, prompt: Tensor, answer: Tensor) -> None:
    """Every token of the answer is the most likely one of one pass over prompt and answer."""
    log_p = case.log_p(answer[:, :-1])
    log_p[..., case.tokenizer.eos_token_id] = -torch.inf  # min_new_tokens forbids it
    require_equal(answer[:, prompt.shape[1]:], log_p.argmax(-1)[:, prompt.shape[1] - 1:])


def greedy(case: Case) -> None:
    require_greedy(case, case.prompt(), case.generate(case.prompt()))


def without_cache(case: Case) -> None:
    require_greedy(case, case.prompt(), case.generate(case.prompt(), use_cache=False))


def sampling(case: Case) -> None:
    prompt = case.prompt()
    torch.manual_seed(5)
    first = case.generate(prompt, do_sample=True, top_p=0.9)
    torch.manual_seed(5)
    require_equal(case.generate(prompt, do_sample=True, top_p=0.9), first)
    require_equal(case.generate(prompt, do_sample=True, top_k=1), case.generate(prompt))


def beams(case: Case) -> None:
    """The reported score of every beam is its log-probability in one pass."""
    prompt, count = case.prompt(1), 6
    out = case.generate(prompt, count, num_beams=4, num_return_sequences=3, length_penalty=0.0,
                        return_dict_in_generate=True, output_scores=True)
    log_p = case.log_p(out.sequences[:, :-1])[:, prompt.shape[1] - 1:]
    own = log_p.gather(2, out.sequences[:, prompt.shape[1]:].unsqueeze(2)).sum((1, 2))
    require_equal(out.sequences_scores, own, 1e-3)
    assert (out.sequences_scores.diff() <= 0).all()


def streamer(case: Case) -> None:
    prompt = case.prompt(1)
    streamer = TextIteratorStreamer(case.tokenizer, skip_prompt=True)
    answer = case.generate(prompt, streamer=streamer)
    assert "".join(streamer) == case.tokenizer.decode(answer[0, prompt.shape[1]:])


def left_padding(case: Case) -> None:
    texts = ["The memory of", "A window of attention has a fixed number of tokens, and then"]
    batch = case.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    together = case.generate(**{"tokens": batch["input_ids"]},
                             attention_mask=batch["attention_mask"])
    for row, text in enumerate(texts):
        alone = case.generate(case.tokenizer(text, return_tensors="pt")["input_ids"])
        require_equal(together[row, -W - 3:], alone[0, -W - 3:])


def text_pipeline(case: Case) -> None:
    talk = pipeline("text-generation", model=case.model, tokenizer=case.tokenizer)
    text = "The memory of"
    said = talk(text, max_new_tokens=9, min_new_tokens=9, do_sample=False)[0]["generated_text"]
    tokens = case.tokenizer(text, return_tensors="pt")["input_ids"]
    wanted = case.tokenizer.decode(case.generate(tokens, 9)[0], skip_special_tokens=True)
    assert said == wanted, f"{said!r} instead of {wanted!r}"


def assisted(case: Case) -> None:
    require_equal(case.generate(case.prompt(1), assistant_model=case.again()),
                  case.generate(case.prompt(1)))


def prompt_lookup(case: Case) -> None:
    require_equal(case.generate(case.prompt(1), prompt_lookup_num_tokens=3),
                  case.generate(case.prompt(1)))


def second_turn(case: Case) -> None:
    prompt = case.prompt()
    first = case.generate(prompt, return_dict_in_generate=True)
    more = torch.cat([first.sequences, case.prompt(2, 7)], dim=1)
    cache = {dm.CACHE: first[dm.CACHE]}
    require_equal(case.generate(more, **cache), case.generate(more))


def turn_of_an_ended_row(case: Case) -> None:
    """A batch of which one row ended before the others, and read on as padding."""
    prompt = case.prompt()
    first = case.generate(prompt, return_dict_in_generate=True)
    mask = torch.ones(2, first.sequences.shape[1] + 7, dtype=torch.long)
    mask[0, -9:-7] = 0
    more = torch.cat([first.sequences, case.prompt(2, 7)], dim=1)
    cache = {dm.CACHE: first[dm.CACHE]}
    require_equal(case.generate(more, attention_mask=mask, **cache),
                  case.generate(more, attention_mask=mask))


def bfloat16(case: Case) -> None:
    """Generates; its log-probabilities are near those of float32."""
    model = case.again(dtype=torch.bfloat16)
    prompt = case.prompt()
    with torch.no_grad():
        near = model(prompt).logits.float().log_softmax(-1)
    answer = model.generate(prompt, max_new_tokens=W, min_new_tokens=W, do_sample=False)
    assert answer.shape == (2, prompt.shape[1] + W) and model.dtype == torch.bfloat16
    off = (near - case.log_p(prompt)).abs().mean().item()
    assert off < 0.1, f"log p differs by {off:.2g} on average"


def compiled(case: Case) -> None:
    """Traced and differentiated by torch.compile; the code that Inductor would make of it takes a
    compiler minutes, and is tested where it pays, in training (`--use_compile`)."""
    torch._dynamo.reset()
    model = torch.compile(case.again(), backend="aot_eager")
    prompt = case.prompt(1, 7)
    with torch.no_grad():
        got = model(prompt).logits.log_softmax(-1)
    require_equal(got, case.log_p(prompt), 1e-4)


def trainer(case: Case) -> None:
    """A step moves memories; of EDM them alone."""
    model, row = case.again(), case.prompt(1)[0].repeat(2)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=f"{SCRATCH.name}/trainer", max_steps=2, per_device_train_batch_size=2,
        report_to=[], use_cpu=True, learning_rate=1e-2, save_strategy="no", disable_tqdm=True)
    Trainer(model=model, args=arguments,
            train_dataset=[{"input_ids": row, "labels": row}] * 4).train()
    moved = {name.split(".")[0] for name, weight in model.named_parameters()
             if not torch.equal(weight, before[name])}
    memories = {"memory", "edm", "early", "late"}
    assert moved & memories, f"moved: {sorted(moved)}"
    assert "memory" in moved or moved <= memories, f"moved: {sorted(moved)}"


def peft_on_top(case: Case) -> None:
    """An adapter of peft's: nothing at first, trained by a step, merged into a model alone."""
    import peft

    names = {name.rsplit(".", 1)[-1] for name, _ in case.model.named_modules()}
    targets = ["c_attn"] if "c_attn" in names else ["q_proj", "v_proj"]
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets)
    model = peft.get_peft_model(case.again(), settings)
    prompt = case.prompt()
    with torch.no_grad():
        require_equal(model.eval()(prompt).logits.log_softmax(-1), case.log_p(prompt), 1e-5)
    model.train()(prompt, labels=prompt).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad.sign() * 1e-2)
        adapted = model.eval()(prompt).logits
        assert (adapted.log_softmax(-1) - case.log_p(prompt)).abs().max() > 1e-3
        require_equal(model.merge_and_unload()(prompt).logits, adapted, 1e-3)


def saved_again(case: Case) -> None:
    folder = Path(tempfile.mkdtemp(dir=SCRATCH.name))
    case.model.save_pretrained(folder)
    loaded = type(case.model).from_pretrained(folder).eval()
    with torch.no_grad():
        require_equal(loaded(case.prompt()).logits, case.model(case.prompt()).logits)


def resized(case: Case) -> None:
    """More tokens, saved and loaded: what was there is as likely beside the rest."""
    folder = Path(tempfile.mkdtemp(dir=SCRATCH.name))
    model, prompt = case.again(), case.prompt()
    model.resize_token_embeddings(len(case.tokenizer) + 5)
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder).eval()
    with torch.no_grad():
        got, wanted = loaded(prompt).logits, model(prompt).logits
    assert got.shape[-1] == len(case.tokenizer) + 5
    require_equal(got, wanted, 1e-5)


def auto_model(case: Case) -> None:
    """AutoModel gives the hidden states, or says in words that it cannot."""
    AutoModel.from_pretrained(case.folder, trust_remote_code=True)


def pickled(case: Case) -> None:
    """As torch.save and a spawned process do it."""
    prompt = case.prompt()
    sent = pickle.loads(pickle.dumps(case.model))
    with torch.no_grad():
        require_equal(sent(prompt).logits, case.model(prompt).logits)


def as_a_tuple(case: Case) -> None:
    """Tokens of int32, an output without names."""
    prompt = case.prompt()
    with torch.no_grad():
        logits, _ = case.model(prompt.int(), return_dict=False)
    require_equal(logits.log_softmax(-1), case.log_p(prompt))


def hidden_states(case: Case) -> None:
    case.generate(case.prompt(), output_hidden_states=True, return_dict_in_generate=True)


def cache_of_transformers(case: Case) -> None:
    case.generate(case.prompt(), **{dm.CACHE: DynamicCache()})


def inputs_embeds(case: Case) -> None:
    case.model(inputs_embeds=torch.zeros(1, 3, 32))


def gradient_checkpointing(case: Case) -> None:
    case.again().gradient_checkpointing_enable()


def lm_eval(case: Case) -> None:
    """Choices in batches and a rolling log-likelihood equal sums of the reference."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    adapter = HFLM(pretrained=case.model, tokenizer=case.tokenizer, batch_size=3, max_length=512)
    pairs = [("The memory of", " a model"), ("A window", " of attention, which is fixed"),
             ("Tokens that left the window some time ago are", " there")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    for (context, target), (got, _) in zip(pairs, adapter.loglikelihood(requests), strict=True):
        start = len(case.tokenizer(context)["input_ids"])
        tokens = torch.tensor([case.tokenizer(context + target)["input_ids"]])
        require_equal(torch.tensor(got), summed(case, tokens, start), 1e-2)
    text = " ".join(context + target for context, target in pairs)
    rolling = Instance("loglikelihood_rolling", {}, (text,), 0)
    tokens = torch.tensor([[case.tokenizer.bos_token_id, *case.tokenizer(text)["input_ids"]]])
    require_equal(torch.tensor(adapter.loglikelihood_rolling([rolling])[0]),
                  summed(case, tokens, 1), 1e-2)


def summed(case: Case, tokens: Tensor, start: int) -> Tensor:
    """The log-probability of tokens (1, T) from a place on, in one pass."""
    log_p = case.log_p(tokens[:, :-1])
    return log_p.gather(2, tokens[:, 1:].unsqueeze(2))[0, start - 1:].sum()


USES: dict[str, tuple[Callable[[Case], None], str]] = {  # and the package that it needs
    "greedy past the window": (greedy, ""),
    "without a cache": (without_cache, ""),
    "sampling": (sampling, ""),
    "beams": (beams, ""),
    "streamer": (streamer, ""),
    "left padding": (left_padding, ""),
    "pipeline": (text_pipeline, ""),
    "assisted decoding": (assisted, ""),
    "prompt lookup": (prompt_lookup, ""),
    "second turn on the cache": (second_turn, ""),
    "second turn of a batch, a row of which had ended": (turn_of_an_ended_row, ""),
    "bfloat16": (bfloat16, ""),
    "torch.compile": (compiled, ""),
    "Trainer": (trainer, "accelerate"),
    "peft on top": (peft_on_top, "peft"),
    "saved again": (saved_again, ""),
    "resized, saved, loaded": (resized, ""),
    "AutoModel": (auto_model, ""),
    "pickled": (pickled, ""),
    "int32, return_dict=False": (as_a_tuple, ""),
    "output_hidden_states": (hidden_states, ""),
    "a cache of transformers' own": (cache_of_transformers, ""),
    "inputs_embeds": (inputs_embeds, ""),
    "gradient checkpointing": (gradient_checkpointing, ""),
    "lm-eval, batches and rolling": (lm_eval, "lm_eval"),
}


# ══ The table ════════════════════════════════════════════════════════════════════════════════════
def tried(use: Callable[[Case], None], package: str, case: Case) -> str:
    """What comes of a use: `yes`, `refused: ...`, `-` or the error."""
    if package and importlib.util.find_spec(package) is None:
        return "-"
    try:
        use(case)
    except ValueError as error:
        return f"refused: {str(error).splitlines()[0]}"
    except Exception as error:  # the table is to show every error
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return "yes"


def try_kind(kind: str, tokenizer: object) -> dict[str, str]:
    """All uses of a kind."""
    folder = Path(SCRATCH.name) / kind
    torch.manual_seed(0)
    if kind == "dnc":
        save_dnc(folder, tokenizer)
    else:
        save_edm(kind, folder, tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    case = Case(folder, load(folder), tokenizer)
    cells = {}
    for name, (use, package) in USES.items():
        began = time.perf_counter()
        cells[name] = tried(use, package, case)
        print(f"{kind}, {name}: {cells[name]} ({time.perf_counter() - began:.1f} s)",
              file=sys.stderr, flush=True)
    return cells


def print_table(results: dict[str, dict[str, str]]) -> None:
    """Print a row for each use, and below it what was not `yes`."""
    print(f"\ntransformers {transformers.__version__}, torch {torch.__version__}\n")
    print("| |" + "".join(f" {kind} |" for kind in results))
    print("|---|" + "---|" * len(results))
    said = {}
    for name in USES:
        cells = [results[kind][name] for kind in results]
        print(f"| {name} |" + "".join(f" {cell.split(':')[0]} |" for cell in cells))
        for cell in cells:
            if ":" in cell:
                said.setdefault(cell, name)
    for cell, name in said.items():
        print(f"  {name}: {cell}")


def main() -> int:
    """-> 1 where a use ended in an error that is no refusal."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kinds", default=",".join(KINDS), help="of " + ", ".join(KINDS))
    parser.add_argument("--json", type=Path, help="write the cells here")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    tokenizer = make_tokenizer()
    results = {}
    for kind in args.kinds.split(","):
        results[kind] = try_kind(kind, tokenizer)
    print_table(results)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    fine = ("yes", "-", "refused")
    return int(any(not cell.startswith(fine) for of in results.values() for cell in of.values()))


if __name__ == "__main__":
    sys.exit(main())

"""Generation and export: the window that moves on, DNCGPT2ForCausalLM, folders without this
repository. The reference is always one pass over all tokens from an empty state, or the equations
of the window written out again."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import error_line, flags
from transformers import (
    AutoTokenizer,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)

import dnc_gpt2
import dnc_model as dm

V, W = 50, 8
BASE = {"vocab_size": V, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": W,
        "bos_token_id": None, "eos_token_id": None,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
KINDS = ("dnc", "gru", "delta", "cache", "none")


def make(dtype=torch.float64, seed: int = 0, base: dict | None = None, **fields):
    """A model whose memory speaks: its parameters are not those of step 0."""
    torch.manual_seed(seed)
    settings = {"mem_slots": 5, "mem_width": 8, "num_reads": 2, "scan": "eager",
                "min_surprisal": 3.9} | fields  # log of V: some tokens are written, others not
    base = GPT2Config(**BASE | (base or {})).to_dict()
    model = dm.DNCGPT2ForCausalLM(dm.DNCGPT2Config(base=base, **settings)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def draw(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, V, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, tokens, **inputs) -> torch.Tensor:
    """log p (B, T, V) after each token, in one call."""
    return model(tokens, **inputs).logits.log_softmax(-1)


def generate(model, tokens, count: int, **options):
    return model.generate(tokens, max_new_tokens=count, pad_token_id=0,
                          **{"do_sample": False, **options})


def is_greedy(model, tokens, prompt: int) -> bool:
    best = logits(model, tokens[:, :-1]).argmax(-1)
    return torch.equal(tokens[:, prompt:], best[:, prompt - 1 :])


# ══ The window ═══════════════════════════════════════════════════════════════════════════════════
@torch.no_grad()
def windows_written_out(model, tokens, stride: int) -> torch.Tensor:
    """log p (T, V) of one row by the definition: token t stands in a window that begins at the
    latest multiple of the stride which leaves it within W tokens; the controller runs over that
    window alone, and the memory reads h of every token once, in order."""
    h = []
    for t in range(len(tokens)):
        start = 0 if t < W else ((t - W) // stride + 1) * stride
        window = tokens[start : t + 1].unsqueeze(0)
        h.append(model.controller(input_ids=window, use_cache=False).last_hidden_state[0, -1])
    h = torch.stack(h).unsqueeze(0)  # (1, T, C)
    pointer = None
    if model.memory is not None:
        table = model.controller.wte.weight
        h, _, trace = model.memory(h, model.init_state(1), tokens.unsqueeze(0),
                                   table[tokens].unsqueeze(0), table)
        pointer = dnc_gpt2.point(trace) if trace is not None else None
    return dnc_gpt2.next_token_log_p(h[0], model.controller.wte.weight, pointer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stride", [0, 3, W])
def test_reading_is_the_controller_over_its_window_and_the_memory_once(kind, stride):
    model, tokens = make(memory=kind, stride=stride), draw(1, 31)
    wanted = windows_written_out(model, tokens[0], stride or W // 2)
    assert torch.allclose(logits(model, tokens)[0], wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_reading_does_not_depend_on_how_tokens_are_cut_into_calls(kind):
    model, tokens = make(memory=kind), draw(2, 40)
    whole, parts, cache = logits(model, tokens), [], None
    for part in tokens.split([1, 6, 1, 1, 13, 2, 16], 1):
        with torch.no_grad():
            out = model(part, **{dm.CACHE: cache})
        parts.append(out.logits.log_softmax(-1))
        cache = out[dm.CACHE]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-12, rtol=0)
    assert cache.get_seq_length() == 40


@pytest.mark.parametrize("kind", KINDS)
def test_padding_anywhere_changes_nothing(kind):
    """On the left, in the middle and on the right; a row of padding alone as well."""
    model, tokens = make(memory=kind), draw(4, 30)
    mask = torch.ones_like(tokens)
    mask[0, :13] = 0
    mask[1, 9:12] = 0
    mask[2, 25:] = 0
    mask[3] = 0
    together = logits(model, tokens, attention_mask=mask)
    for row in range(3):
        real = mask[row].bool()
        alone = logits(model, tokens[row : row + 1, real])
        assert torch.allclose(together[row, real], alone[0], atol=1e-12, rtol=0)


def test_rows_of_a_batch_do_not_see_each_other():
    model, tokens = make(), draw(2, 30)
    other = tokens.clone()
    other[1] = draw(1, 30, seed=9)
    assert torch.equal(logits(model, tokens)[0], logits(model, other)[0])


def test_probabilities_sum_to_one_with_a_full_memory():
    p = logits(make(), draw(2, 60)).exp()
    assert torch.allclose(p.sum(-1), torch.ones(2, 60, dtype=p.dtype), atol=1e-12, rtol=0)


def test_state_is_as_large_after_any_length():
    model = make()
    sizes = []
    for length in (1, 90):
        out = model(draw(1, length))
        shapes = []
        dnc_gpt2.map_state(lambda x, shapes=shapes: shapes.append(x.shape), out[dm.CACHE].state)
        sizes.append(shapes)
    assert sizes[0] == sizes[1]


def test_blocks_are_the_windows_of_evaluation():
    """With stride = seq_len the folder's loss is that of dnc_gpt2's own evaluation."""
    config = dnc_gpt2.Config(hidden_size=16, num_layers=2, num_heads=2, seq_len=W, mem_slots=5,
                             mem_width=8, num_reads=2, batch_size=4, precision="float32",
                             min_surprisal=3.9, scan="eager")
    model = dnc_gpt2.build_model(config, dnc_gpt2.controller_config(config, V)).double()
    other = make(stride=W)
    missing = other.load_state_dict(model.state_dict())
    assert not missing.missing_keys and not missing.unexpected_keys
    tokens, state, scores = draw(2, 41), model.init_state(2), []
    for x, y in zip(tokens[:, :-1].split(W, 1), tokens[:, 1:].split(W, 1), strict=True):
        stats, state = model.measure(x, y, state, brief=True)
        scores.append(stats[..., 0])
    log_p = logits(other, tokens[:, :-1])
    wanted = -log_p.gather(2, tokens[:, 1:].unsqueeze(2)).squeeze(2)
    assert torch.allclose(torch.cat(scores, 1).double(), wanted, atol=1e-5, rtol=0)


# ══ generate ═════════════════════════════════════════════════════════════════════════════════════
@pytest.mark.parametrize("kind", KINDS)
def test_generate_equals_a_pass_without_cache(kind):
    model, prompt = make(memory=kind), draw(2, 7)
    tokens = generate(model, prompt, 30)
    assert tokens.shape == (2, 37) and is_greedy(model, tokens, 7)
    assert len(set(tokens[0, 7:].tolist())) > 1  # not the same token for ever
    assert torch.equal(generate(model, prompt, 9, use_cache=False), tokens[:, :16])


def test_generate_beams_equal_a_naive_search():
    model, prompts = make(), draw(2, 5)
    wanted = []
    for prompt in prompts.tolist():
        alive = [(0.0, prompt)]
        for _ in range(12):
            p = logits(model, torch.tensor([ids for _, ids in alive]))[:, -1]
            grown = [(score + float(p[i, token]), [*ids, token])
                     for i, (score, ids) in enumerate(alive) for token in range(V)]
            alive = sorted(grown, reverse=True)[:3]
        wanted += [ids for _, ids in alive]
    beams = generate(model, prompts, 12, num_beams=3, num_return_sequences=3)
    assert beams.tolist() == wanted
    assert not is_greedy(model, beams[:1], 5)  # beams matter


def test_generate_samples_of_a_seed_are_the_same():
    model, prompt, samples = make(), draw(2, 9), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        samples.append(generate(model, prompt, 12, do_sample=True, num_return_sequences=3))
    assert torch.equal(samples[0], samples[1]) and not torch.equal(samples[0], samples[2])
    assert len({tuple(row) for row in samples[0].tolist()}) == 6
    only = generate(model, prompt, 12, do_sample=True, top_k=1, num_return_sequences=2)
    assert is_greedy(model, only, 9)


def test_generate_second_turn_and_padded_batch_equal_one_pass():
    model, prompt, more = make(), draw(2, 20), draw(2, 9, seed=5)
    mask = torch.ones_like(prompt)
    mask[0, :14] = 0
    first = generate(model, prompt, 10, attention_mask=mask, return_dict_in_generate=True)
    alone = generate(model, prompt[:1, 14:], 10)
    assert torch.equal(first.sequences[0, 20:], alone[0, 6:])
    both, mask = torch.cat([first.sequences, more], 1), F.pad(mask, (0, 19), value=1)
    wanted = generate(model, both, 12, attention_mask=mask)
    for _ in range(2):  # a turn takes nothing from the cache
        again = generate(model, both, 12, attention_mask=mask, **{dm.CACHE: first[dm.CACHE]})
        assert torch.equal(again, wanted)


def test_a_cache_that_has_read_what_is_padding_now_is_refused():
    """generate() lets a row that has ended read on; its next turn must not follow what it read."""
    model, prompt = make(), draw(2, 12)
    with torch.no_grad():
        first = model(prompt)
        cache = {dm.CACHE: first[dm.CACHE]}
        mask = torch.ones(2, 15, dtype=torch.long)
        assert model(draw(2, 3), attention_mask=mask, **cache).logits.shape[1] == 3
        mask[1, 8:12] = 0
        with pytest.raises(ValueError, match="row 1 of the cache"):
            model(draw(2, 3), attention_mask=mask, **cache)
        with pytest.raises(ValueError, match=r"attention_mask: \(2, 9\); must be of the 3"):
            model(draw(2, 3), attention_mask=mask[:, :9], **cache)
        with pytest.raises(ValueError, match="input_ids: 12 columns.*has read 12"):
            generate(model, prompt, 2, **cache)
        swapped = first[dm.CACHE]
        swapped.read[0, :4] = False
        swapped.reorder_cache(torch.tensor([1, 0]))
        assert swapped.read[:, 0].tolist() == [True, False]


@pytest.mark.parametrize("shape", [(1, 3), (1, 13), (2, 12), (12,)])
def test_a_mask_that_is_not_of_the_columns_is_refused(shape):
    with pytest.raises(ValueError, match=r"^attention_mask: \(.*; must be of the 12 new columns"):
        make()(draw(1, 12), attention_mask=torch.ones(shape))


def test_a_cache_of_other_rows_is_refused():
    model, tokens = make(), draw(2, 12)
    for rows, more in ((1, 2), (2, 1)):
        cache = {dm.CACHE: model(tokens[:rows])[dm.CACHE]}
        with pytest.raises(ValueError, match=f"of {rows} rows, but input_ids has {more}; hand"):
            model(tokens[:more], **cache)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_may_have_either_name_and_one_of_transformers_is_refused(name):
    """An empty one too, which is false to Python; in forward and in generate."""
    model, tokens = make(), draw(2, 12)
    cache = model(tokens[:, :9])[dm.CACHE]
    wanted = generate(model, tokens, 5)
    assert torch.equal(generate(model, tokens, 5, **{name: cache}), wanted)
    assert torch.allclose(logits(model, tokens[:, 9:], **{name: cache}),
                          logits(model, tokens)[:, 9:], atol=1e-12, rtol=0)
    for use in (model, lambda x, **given: generate(model, x, 5, **given)):
        with pytest.raises(ValueError, match="of type DynamicCache; must be what an earlier call"):
            use(tokens, **{name: DynamicCache()})
        with pytest.raises(ValueError, match="cache and past_key_values: two names of one"):
            use(tokens, cache=cache, past_key_values=cache)


def test_tokens_and_labels_may_be_any_whole_numbers():
    model, tokens = make(), draw(2, 20)
    wanted = model(tokens, labels=tokens)
    for dtype in (torch.int32, torch.int16):
        out = model(tokens.to(dtype), labels=tokens.to(dtype))
        assert torch.equal(out.logits, wanted.logits) and torch.equal(out.loss, wanted.loss)
    with pytest.raises(ValueError, match="^input_ids: torch.float32 of .*must be whole numbers"):
        model(tokens.float())
    with pytest.raises(ValueError, match=r"^input_ids: .* of \(20,\); must be .*\(rows, columns\)"):
        model(tokens[0])


def test_return_dict_false_gives_a_tuple():
    """In the call and in the configuration; generate() needs none."""
    model, tokens = make(), draw(2, 20)
    out = model(tokens, labels=tokens)
    loss, scores, cache = model(tokens, labels=tokens, return_dict=False)
    assert torch.equal(loss, out.loss) and torch.equal(scores, out.logits)
    assert cache.get_seq_length() == 20
    model.config.return_dict = False
    assert torch.equal(model(tokens)[0], out.logits)
    assert torch.equal(model(tokens, return_dict=True).logits, out.logits)
    assert is_greedy(make(), generate(model, tokens, 5), 20)


def test_logits_to_keep_may_name_columns():
    model, tokens = make(), draw(2, 20)
    some = torch.tensor([3, 19, 0])
    assert torch.allclose(logits(model, tokens, logits_to_keep=some),
                          logits(model, tokens)[:, some], atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match=r"logits_to_keep: a tensor of \(\); must be a whole"):
        model(tokens, logits_to_keep=torch.tensor(3))


def test_forward_refuses_what_it_would_not_use():
    with pytest.raises(ValueError, match="position_ids: not used"):
        make()(draw(1, 4), position_ids=torch.arange(4))
    with pytest.raises(ValueError, match="inputs_embeds: not used"):
        make()(inputs_embeds=torch.zeros(1, 4, 16))
    with pytest.raises(ValueError, match="input_ids: required"):
        make()()


@pytest.mark.parametrize("name", ["output_attentions", "output_hidden_states"])
def test_generate_refuses_outputs_that_there_are_none_of(name):
    """As an argument and in the model's own settings of generation; scores it has."""
    model, prompt = make(), draw(1, 9)
    words = f"{name}: not used by DNCGPT2ForCausalLM"
    with pytest.raises(ValueError, match=words):
        generate(model, prompt, 3, return_dict_in_generate=True, **{name: True})
    out = generate(model, prompt, 3, return_dict_in_generate=True, output_scores=True)
    assert len(out.scores) == 3
    setattr(model.generation_config, name, True)
    with pytest.raises(ValueError, match=words):
        generate(model, prompt, 3, num_beams=2)


@pytest.mark.parametrize("fields, words", [
    ({"seq_len": 99}, "seq_len = 99"), ({"stride": 9}, "stride = 9"), ({"memory": "tape"}, "tape"),
    ({"seq_len": 2.5}, "seq_len = 2.5: must be a whole number"),
    ({"stride": -1}, "stride = -1: must be 0 or more"),
    ({"mem_slots": 0}, "mem_slots = 0: must be above 0"),
    ({"mem_slots": True}, "mem_slots = True: must be a whole number"),
    ({"mem_width": 1}, "mem_width = 1: must be 2 or more to be split"),
    ({"num_reads": "4"}, "num_reads = '4': must be a whole number"),
    ({"pointing": "yes"}, "pointing = 'yes': must be True or False"),
    ({"row_key": "foo"}, "row_key = 'foo': must be one of previous, own"),
    ({"usage_decay": 3.0}, "usage_decay = 3.0: must be from 0 to 1, or one of auto"),
    ({"usage_decay": "x"}, "usage_decay = 'x': must be a finite number, or one of auto"),
    ({"usage_decay": math.nan}, "usage_decay = nan: must be a finite number, or one of auto"),
    ({"min_surprisal": -1.0}, "min_surprisal = -1.0: must be 0 or more"),
    ({"mask_min": 0.5}, "mask_min = 0.5: must be 1 with split rows"),
    ({"sharpen_links": True}, "sharpen_links = True: must be False without links"),
    ({"lambda_vocabulary": None}, "lambda_vocabulary = None: must be a finite number"),
    ({"scan": "fast"}, "scan = 'fast': must be one of auto, eager, fused")])
def test_config_refuses_what_does_not_fit(fields, words):
    with pytest.raises(ValueError, match=words) as error:
        make(**fields)
    assert "\n" not in str(error.value)


def test_config_keeps_what_transformers_or_others_write_in_it():
    """As every configuration does; a wrong name among the fields of from_gpt2 is one of ours."""
    config = dm.DNCGPT2Config(written_by="someone", usage_decay=1, mask_min=1)
    config.check()
    assert config.written_by == "someone" and config.mem_slots == 64
    with pytest.raises(ValueError, match="^mem_slotz: must be a field of .* mem_slots, "):
        dm.DNCGPT2ForCausalLM.from_gpt2("nowhere", mem_slotz=4)


# ══ A pretrained GPT-2, training, saving ═════════════════════════════════════════════════════════
@pytest.fixture
def gpt2_folder(tmp_path):
    torch.manual_seed(4)
    model = GPT2LMHeadModel(GPT2Config(**BASE | {"n_positions": 16}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_wrapped_gpt2_is_gpt2_at_step_0_and_learns(gpt2_folder, tmp_path):
    """Its pointing starts from nothing, and has a gradient; one step of Trainer opens it."""
    gpt2 = GPT2LMHeadModel.from_pretrained(gpt2_folder).eval()
    model = dm.DNCGPT2ForCausalLM.from_gpt2(str(gpt2_folder), mem_slots=5, mem_width=8).eval()
    tokens = draw(2, 16)
    with torch.no_grad():
        wanted, got = gpt2(tokens).logits, model(tokens).logits
    assert torch.allclose(got, wanted, atol=1e-5, rtol=0)
    train_one_step(model, tmp_path)
    assert model.gate != 0


def test_wrapped_gpt2_ends_where_gpt2_ends(tmp_path):
    config = GPT2Config(**BASE | {"eos_token_id": 7, "bos_token_id": 7})
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    model = dm.DNCGPT2ForCausalLM.from_gpt2(str(tmp_path / "gpt2"), mem_slots=5, mem_width=8)
    model.save_pretrained(tmp_path / "saved")
    again = dm.DNCGPT2ForCausalLM.from_pretrained(tmp_path / "saved")
    for some in (model, again):
        assert some.generation_config.eos_token_id == some.config.eos_token_id == 7


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_attention_runs_as_it_is_asked_for(kind, tmp_path):
    model, tokens = make(torch.float32), draw(2, 20)
    model.save_pretrained(tmp_path)
    again = dm.DNCGPT2ForCausalLM.from_pretrained(tmp_path, attn_implementation=kind).eval()
    assert again.controller.config._attn_implementation == kind
    torch.testing.assert_close(logits(again, tokens), logits(model, tokens), rtol=0, atol=1e-4)


def train_one_step(model, folder) -> None:
    """One optimizer step of transformers' Trainer on repeated tokens; warnings of ours are errors.
    """
    row = draw(1, 10)[0].repeat(4)
    rows = [{"input_ids": row, "labels": row}] * 4
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), max_steps=1, per_device_train_batch_size=2,
        report_to=[], use_cpu=True, learning_rate=1e-2, save_strategy="no", disable_tqdm=True)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        result = Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert math.isfinite(result.training_loss)
    moved = [name for name, weight in model.named_parameters()
             if not torch.equal(weight, before[name])]
    assert any(name.startswith(("memory.", "edm.")) for name in moved)


def test_trainer_takes_a_step_in_float32_and_bf16_generates(tmp_path):
    model = make(torch.float32)
    train_one_step(model, tmp_path)
    tokens = generate(model.to(torch.bfloat16), draw(2, 7), 12)
    assert tokens.shape == (2, 19)


def test_trainer_takes_a_step_on_a_notebook(edm_base, tmp_path):
    import edm_oracle

    import edm_gpt2

    model = edm_gpt2.build_model(edm_base, edm_oracle.edm_config(), "edm", 0)
    train_one_step(model, tmp_path)


def test_training_loss_adds_the_vocabulary_alone():
    model, tokens = make(lambda_vocabulary=0.5), draw(2, 20)
    evaluated = model(tokens, labels=tokens).loss
    h, _, _ = model.read(tokens, torch.ones_like(tokens, dtype=torch.bool),
                         dnc_gpt2.start_reading(model, 2))
    alone = dm.next_token_loss(h @ model.controller.wte.weight.T, tokens)
    trained = model.train()(tokens, labels=tokens).loss
    assert torch.allclose(trained, evaluated + 0.5 * alone)
    mixture = logits(model.eval(), tokens[:, :-1]).gather(2, tokens[:, 1:].unsqueeze(2))
    assert torch.allclose(evaluated, -mixture.mean())


def test_resized_model_is_saved_and_comes_back(tmp_path):
    model = make(torch.float32)
    model.resize_token_embeddings(V + 3)
    model.save_pretrained(tmp_path)
    loaded = dm.DNCGPT2ForCausalLM.from_pretrained(tmp_path)
    tokens = draw(1, 20)
    assert loaded.config.vocab_size == V + 3
    assert torch.allclose(logits(loaded, tokens), logits(model, tokens), atol=1e-5)


@pytest.mark.parametrize("option", [{"assistant_model": True}, {"prompt_lookup_num_tokens": 3}])
def test_assisted_decoding_is_refused_in_words(option):
    model = make()
    option = {name: model if value is True else value for name, value in option.items()}
    with pytest.raises(ValueError, match="cannot forget wrong guesses; leave it out"):
        generate(model, draw(1, 9), 3, **option)


def test_what_a_file_lacks_starts_as_it_is_built(tmp_path):
    """A baseline loaded with a DNC, and a gate of pointing: not whatever lay in memory."""
    make(torch.float32, memory="none").save_pretrained(tmp_path)
    fields = {"memory": "dnc", "mem_slots": 5, "mem_width": 8, "pointer_gate": True}
    model, info = dm.DNCGPT2ForCausalLM.from_pretrained(tmp_path, output_loading_info=True,
                                                        **fields)
    assert {"gate", "memory.read_proj.weight"} <= set(info["missing_keys"])
    assert model.gate == 0 and not model.memory.read_proj.weight.any()
    row_key = model.memory.interface.row_key.weight
    assert torch.allclose(row_key @ row_key.T, torch.eye(len(row_key)), atol=1e-5)


def test_what_a_file_has_in_another_size_starts_as_it_is_built(tmp_path):
    """Wider rows, another read head: what fits is the file's; the rest has the chosen first value,
    or is drawn as widely."""
    model, wider = make(torch.float32), {"mem_width": 16, "num_reads": 3}
    model.save_pretrained(tmp_path)
    loaded, info = dm.DNCGPT2ForCausalLM.from_pretrained(
        tmp_path, ignore_mismatched_sizes=True, output_loading_info=True, **wider)
    changed = {name for name, *_ in info["mismatched_keys"]}
    assert {"memory.read_proj.weight", "memory.interface.row_key.weight"} <= changed
    torch.manual_seed(0)
    built, again = (dm.DNCGPT2ForCausalLM(loaded.config).state_dict() for _ in range(2))
    for name, weight in loaded.state_dict().items():
        if name not in changed:
            assert torch.equal(weight, model.state_dict()[name]), name
        elif torch.equal(built[name], again[name]):
            assert torch.equal(weight, built[name]), name
        else:
            assert 0 < weight.abs().max() < 3 * built[name].abs().max(), name


def test_padding_alone_is_refused():
    with pytest.raises(ValueError, match="every one is padding"):
        make()(draw(1, 3), attention_mask=torch.zeros(1, 3, dtype=torch.long))


def test_push_to_hub_sends_the_card_of_the_folder(tmp_path, monkeypatch):
    import huggingface_hub

    make(torch.float32).save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("measured")
    model, sent = dm.DNCGPT2ForCausalLM.from_pretrained(tmp_path), []
    monkeypatch.setattr(dm.PreTrainedModel, "push_to_hub", lambda self, name, **kwargs: name)
    monkeypatch.setattr(huggingface_hub, "upload_file",
                        lambda **kwargs: sent.append(kwargs["path_or_fileobj"].read_text()))
    assert model.push_to_hub("someone/memory") == "someone/memory" and sent == ["measured"]


# ══ The commands ═════════════════════════════════════════════════════════════════════════════════
@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory) -> Path:
    """The folder of the finished tiny run's DNC."""
    folder = tmp_path_factory.mktemp("export") / "model"
    assert dnc_gpt2.main([f"--save_dir={finished.save_dir}", f"--export={folder}"]) == 0
    return folder


ELSEWHERE = """
import importlib.util, pickle, sys, warnings
import torch
warnings.simplefilter("error", FutureWarning)
torch.set_num_threads(1)
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer
from transformers import pipeline
assert importlib.util.find_spec("dnc_gpt2") is None
for name in ("tyro", "scipy", "datasets", "numba", "matplotlib"):
    sys.modules[name] = None  # not installed, as far as an import can see
folder, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
assert None not in ids
other = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert type(other).__name__ == type(model).__name__
tokens = torch.load(out + "/tokens.pt")
with torch.no_grad():
    result = model(tokens)
    logits, cache = result.logits, result[sys.modules[type(model).__module__].CACHE]
    sent, sent_cache = pickle.loads(pickle.dumps((model, cache)))  # as to another process
    later, wanted = sent(tokens, cache=sent_cache).logits, model(tokens, cache=cache).logits
assert torch.equal(later, wanted)
batch = tokenizer(["Ba den", "Fi gor hul ka lem ni or"], return_tensors="pt", padding=True)
together = model.generate(**batch, max_new_tokens=8, do_sample=False)
alone = tokenizer(["Ba den"], return_tensors="pt")
alone = model.generate(**alone, max_new_tokens=8, do_sample=False)
assert torch.equal(together[0, -8:], alone[0, -8:])
streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
model.generate(**tokenizer("Ba den", return_tensors="pt"), max_new_tokens=8, do_sample=False,
               streamer=streamer)
assert "".join(streamer) == tokenizer.decode(alone[0, -8:])
talk = pipeline("text-generation", model=model, tokenizer=tokenizer)
said = talk("Ba den", max_new_tokens=8, do_sample=False)[0]["generated_text"]
assert said == tokenizer.decode(alone[0])
torch.save((logits, ids), out + "/results.pt")
"""


def test_exported_folder_works_elsewhere(exported, finished, tmp_path):
    """Without this repository and what its requirements bring; its logits are the checkpoint's, but
    for the end token, which takes at most 1 / (V + 1) of the probability."""
    path = next(finished.save_dir.glob("GPT2_+_DNC_FINAL*.pt"))
    model = dnc_gpt2.load_trained(path, "eager").model
    vocabulary = len(model.head_weight())
    tokens = torch.randint(0, vocabulary, (2, 40), generator=torch.Generator().manual_seed(0))
    torch.save(tokens, tmp_path / "tokens.pt")
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1",
           "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, str(exported), str(tmp_path)], env=env,
                          cwd=tmp_path, text=True, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "of type" not in done.stderr and "arning" not in done.stderr
    theirs, ids = torch.load(tmp_path / "results.pt")
    assert ids == (vocabulary, vocabulary, vocabulary)

    state = dnc_gpt2.start_reading(model, 2)
    counts = torch.full((2,), 40)
    with torch.no_grad():
        _, h, _, trace = dnc_gpt2.read_on(model, tokens, counts, state)
        ours = dnc_gpt2.next_token_log_p(h.flatten(0, 1), model.head_weight(),
                                         model.pointer(trace)).view(2, 40, -1)
    lost = ours - theirs[..., :vocabulary]
    assert -1e-4 < lost.min() and lost.max() < math.log(1 + 1 / vocabulary) + 1e-4


def test_exported_card_has_the_measured_table(exported, finished):
    card = (exported / "README.md").read_text(encoding="utf-8")
    row = next(line for line in card.splitlines() if line.startswith("| Perplexity"))
    shown = re.findall(r"[\d.]+", row)
    table = next(line for line in finished.stdout.splitlines() if "Perplexity ↓" in line)
    assert shown == re.findall(r"[\d.]+", table)[:2] and "pipeline_tag: text-generation" in card
    config = json.loads((exported / "config.json").read_text())
    assert config["mem_slots"] == 8 and config["eos_token_id"] == config["base"]["vocab_size"] - 1


def test_end_token_of_a_tokenizer_that_has_one_keeps_its_number(tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder).backend_tokenizer
    weight = torch.randn(tokenizer.get_vocab_size(), 3)
    fast, grown = dnc_gpt2.with_end_token(tokenizer, weight)
    assert torch.equal(grown[:-1], weight) and torch.allclose(grown[-1], weight.mean(0), atol=1e-6)
    again, same = dnc_gpt2.with_end_token(fast.backend_tokenizer, grown)
    assert torch.equal(same, grown) and again.eos_token_id == fast.eos_token_id == len(weight)


def test_a_saved_tokenizer_puts_nothing_before_a_text(tokenizer_folder):
    """Models are trained and scored on texts without a token of their beginning."""
    from tokenizers import processors

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder).backend_tokenizer
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
    weight = torch.randn(tokenizer.get_vocab_size(), 3)
    fast, _ = dnc_gpt2.with_end_token(tokenizer, weight)
    assert fast("a word").input_ids == tokenizer.encode("a word", add_special_tokens=False).ids


def test_generate_command_is_the_exported_model_greedy(finished, exported, main, capsys):
    """The same text as transformers' greedy generate."""
    argv = flags({"save_dir": finished.save_dir, "generate": "Ba den fi", "new_tokens": 30})
    assert main([*argv, "--temperature=0"]) == 0
    model = dm.DNCGPT2ForCausalLM.from_pretrained(exported)
    tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    prompt = tokenizer("Ba den fi", return_tensors="pt")
    wanted = tokenizer.decode(generate(model, prompt["input_ids"], 30)[0])
    out = capsys.readouterr().out
    assert wanted in out and "30 tokens," in out


def test_pick_token_draws_from_top_k_and_top_p_alone():
    draw_from = torch.Generator().manual_seed(0)
    shares = torch.tensor([0.05, 0.5, 0.3, 0.15])

    def drawn(**options) -> set[int]:
        return {dnc_gpt2.pick_token(shares.log(), 1.0, draw_from, **options) for _ in range(300)}

    assert drawn() == {0, 1, 2, 3} and drawn(top_k=2) == {1, 2} and drawn(top_p=0.79) == {1, 2}
    assert drawn(top_p=0.81) == {1, 2, 3} and drawn(top_p=0.4) == {1}
    assert drawn(top_k=3, top_p=0.8) == {1, 2}
    assert drawn(top_p=0.0) == {1}  # the most likely one is always left
    for coldest in (0.0, 1e-40):
        assert dnc_gpt2.pick_token(shares.log(), coldest, draw_from) == 1


def test_card_compares_runs_that_differ_by_their_arm_alone(finished):
    paths = [finished.save_dir / f"{stem}_FINAL_step40.pt" for stem in
             ("GPT2_+_DNC", "GPT2_Baseline")]
    dnc, baseline = (dnc_gpt2.load_checkpoint(str(path)) for path in paths)
    assert dnc_gpt2.is_comparable(dnc, baseline)
    for field, value in {"batch_size": 2, "hidden_size": 64, "lr": 1.0, "seed": 1}.items():
        other = baseline | {"config": baseline["config"] | {field: value}}
        assert not dnc_gpt2.is_comparable(dnc, other), field
    chosen = {"lr_grid": "1e-3,1"}
    assert dnc_gpt2.is_comparable(dnc | {"config": dnc["config"] | chosen}, baseline | {
        "config": baseline["config"] | chosen | {"lr": 1.0}})


def test_raised_token_names_the_position_that_its_slot_was_written_at():
    """Slot 1 took the token of position 4, slot 0 that of position 2."""
    write_weights = torch.zeros(1, 5, 2)
    write_weights[0, 2, 0] = write_weights[0, 4, 1] = 0.9
    written_at = dnc_gpt2.positions_held(write_weights, 0, None)
    assert written_at.tolist() == [[2, 4]]
    later = dnc_gpt2.positions_held(torch.tensor([[[0.8, 0.1]]]), 5, written_at)
    assert later.tolist() == [[5, 4]]
    pointer = dnc_gpt2.Pointer(torch.tensor([[7, 7]]), torch.tensor([[0.2, 0.5]]))
    assert dnc_gpt2.source_of(7, pointer, written_at) == 4
    assert dnc_gpt2.source_of(6, pointer, written_at) == -1


def test_show_gates_colours_and_marks_and_changes_no_token(finished, main, capsys):
    """Every piece has a background; without the colours it is the text of the same seed."""
    argv = flags({"save_dir": finished.save_dir, "generate": "Ba den fi", "new_tokens": 60})
    texts = []
    for more in (["--show_gates=True"], [], ["--seed=1"]):
        assert main([*argv, *more]) == 0
        texts.append(capsys.readouterr().out.split("\n\n  60 tokens")[0])
    shown, plain, other = texts
    bare = re.sub(r"\x1b\[33m\[.*?\]\x1b\[0m", "", shown, flags=re.DOTALL)
    bare = re.sub(r"\x1b\[[0-9;]*m", "", bare)
    assert bare == plain != other and shown.count("\x1b[97;48;5;") > 40


@pytest.mark.parametrize("argv, words", [
    (["--generate=Ba"], "no checkpoint in"),
    (["--export=out"], "no checkpoint in"),
    (["--generate=Ba", "--checkpoint=none.pt"], "none.pt: is not there"),
    (["--generate=Ba", "--top_p=2"], "top_p")])
def test_generate_and_export_refuse_in_one_line(argv, words, main, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    assert words in error_line(capsys.readouterr().err)


def test_show_gates_of_a_model_without_gates_is_refused(finished, main, capsys):
    path = next(finished.save_dir.glob("GPT2_Baseline_FINAL*.pt"))
    argv = ["--generate=Ba", f"--checkpoint={path}", "--show_gates=True"]
    assert main(argv) == 2 and "no write gates" in error_line(capsys.readouterr().err)


def test_a_stopped_generation_does_not_speak_of_training(finished, main, capsys, monkeypatch):
    """Nothing was to be saved: --resume auto would start a training."""
    path = next(finished.save_dir.glob("GPT2_+_DNC_FINAL*.pt"))
    monkeypatch.setattr(dnc_gpt2, "pick_token", lambda *_: signal.raise_signal(signal.SIGINT))
    argv = ["--generate", "Ba", f"--checkpoint={path}"]
    assert main(argv) == 128 + signal.SIGINT
    said = capsys.readouterr().err.strip().splitlines()
    assert said[0] == "stopped; nothing to save; run it again with:"
    assert said[1].endswith(f"dnc_gpt2.py {' '.join(argv)}") and len(said) == 2


def test_damaged_newest_checkpoint_is_passed_over(finished, tmp_path, main, capsys):
    good = next(finished.save_dir.glob("GPT2_+_DNC_FINAL*.pt"))
    (tmp_path / good.name).write_bytes(good.read_bytes())
    os.utime(tmp_path / good.name, (1, 1))
    (tmp_path / "GPT2_+_DNC_FINAL_step99.pt").write_bytes(good.read_bytes()[:2000])
    assert main([f"--save_dir={tmp_path}", "--generate=Ba", "--new_tokens=2"]) == 0
    out = capsys.readouterr().out
    assert "passed over" in out and "2 tokens," in out


# ══ lm-evaluation-harness ════════════════════════════════════════════════════════════════════════
@pytest.mark.slow
def test_harness_scores_both_kinds_of_folder(exported, edm_base, tmp_path):
    """A local task, through lm-eval's own adapter, batched and rolling: the rolling figure is the
    model's own loss over the text behind the end token."""
    pytest.importorskip("lm_eval")
    import edm_oracle

    import edm_gpt2

    edm = edm_gpt2.build_model(edm_base, edm_oracle.edm_config(), "edm", 0).eval()
    edm_gpt2.save_model(edm, edm_base, tmp_path / "edm")
    text = "Ba den fi gor. Hul ka lem ni or pe ras. " * 20
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    script = Path(dnc_gpt2.__file__).with_name("benchmarks") / "harness.py"
    argv = [sys.executable, str(script), "--text", "text.txt", "--chars", "300", "--stretches", "2",
            "--questions", "3", "--batch", "4", "--json", "out.json", str(exported), "edm"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(argv, cwd=tmp_path, env=env, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads((tmp_path / "out.json").read_text())
    model = dm.DNCGPT2ForCausalLM.from_pretrained(exported)
    tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    nats, size = 0.0, 0
    for start in (0, len(text) // 2):
        part = text[start : start + 300]
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(part)["input_ids"]]])
        nats += logits(model, ids[:, :-1]).gather(2, ids[:, 1:].unsqueeze(2)).sum().item()
        size += len(part.encode())
    bits = -nats / size / math.log(2)
    assert figures[str(exported)]["bits per byte"] == pytest.approx(bits, rel=1e-3)
    assert math.isfinite(figures["edm"]["bits per byte"])
    assert 0 <= figures["edm"]["choice accuracy"] <= 1

"""Tests of EDM on decoders of Llama's family: the model against transformers' own, cuts, padding,
generation, saved folders, adapters, training, refusals and the command. Every base is tiny and
random; token and place matter to it.
"""

from __future__ import annotations

import os
import subprocess
import sys

import edm_oracle as oracle
import pytest
import torch
import torch.nn.functional as F
from conftest import error_line, flags
from edm_oracle import RUN, TINY, V, W, close, draw, one_line, same_bits, same_memory
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast

import dnc_gpt2
import edm_gpt2 as eg
import edm_model as em

SHAPE = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
             tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=None)
KINDS = {
    "llama": dict(model_type="llama"),
    "untied": dict(model_type="llama", tie_word_embeddings=False, num_key_value_heads=4),
    "mistral": dict(model_type="mistral", sliding_window=W, head_dim=12),
    "qwen2": dict(model_type="qwen2", tie_word_embeddings=False),
    "qwen3": dict(model_type="qwen3", head_dim=16),
    "gemma": dict(model_type="gemma", head_dim=16, num_key_value_heads=1),
}
every_kind = pytest.mark.parametrize("kind", list(KINDS))


def make_decoder(kind: str, **fields):
    """A plain decoder with every weight away from its initial value."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**SHAPE | KINDS[kind] | fields)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def make(kind: str, alpha: float = 0.5, dtype: torch.dtype = torch.float32, **fields):
    """The decoder with memories whose weights are away from their initial values."""
    plain = make_decoder(kind)
    torch.manual_seed(1)
    options = TINY | {"key_of": "previous", "pointing": True} | fields
    model = em.EDMForCausalLM(em.EDMConfig(base=plain.config.to_dict(), **options))
    model.transformer.load_state_dict(plain.model.state_dict())
    if model.lm_head is not None:
        model.lm_head.load_state_dict(plain.lm_head.state_dict())
    return oracle.moved(model, alpha).to(dtype)


def base_of(kind: str, tokenizer, **fields) -> eg.Base:
    """The decoder as edm_gpt2 freezes it."""
    plain = make_decoder(kind, **fields)
    head = None if plain.config.tie_word_embeddings else plain.lm_head.weight.detach()
    return eg.Base(kind, plain.config.to_dict(), plain.model.state_dict(), tokenizer, origin="",
                   head=head)


def read(model, tokens, cache=None, **options):
    """logits (B, T, V) and the cache behind them, without a graph."""
    with torch.no_grad():
        out = model(tokens, **{em.CACHE: cache}, **options)
    return out.logits, out[em.CACHE]


def memories(model) -> dict[str, nn.Parameter]:
    """The parameters that are neither the base's nor its head's."""
    frozen = ("transformer.", "lm_head.")
    return {name: p for name, p in model.named_parameters() if not name.startswith(frozen)}


# ══ The model against transformers' own ══════════════════════════════════════════════════════════
@every_kind
def test_step_zero_equals_the_base_bit_for_bit(kind):
    """In a window that comes whole, through the base's own head; with open gates what stands behind
    the first window differs, and nothing in it."""
    plain = make_decoder(kind)
    for T in (1, 7, W):
        tokens = draw(3, T)
        with torch.no_grad():
            assert torch.equal(read(make(kind, 0.0), tokens)[0], plain(tokens).logits)
    tokens = draw(3, 40)
    closed, opened = (read(make(kind, alpha), tokens)[0] for alpha in (0.0, 0.5))
    assert torch.equal(closed[:, :W], opened[:, :W])
    assert ((closed - opened)[:, W:].abs().amax(-1) > 1e-4).all()


@every_kind
@pytest.mark.parametrize("stride", [5, W])
def test_closed_gates_give_the_base_of_each_window(kind, stride):
    """Every token has the logits of the plain decoder over the tokens that are in its window, from
    position 0 on."""
    plain, tokens = make_decoder(kind).double(), draw(2, 45)
    logits, _ = read(make(kind, 0.0, torch.float64, stride=stride), tokens)
    for t in range(45):
        start = oracle.first_start(t + 1, stride)
        with torch.no_grad():
            wanted = plain(tokens[:, start : t + 1]).logits[:, -1]
        close(logits[:, t], wanted, 1e-9)


@every_kind
def test_eager_attention_gives_the_same(kind):
    """Its masks are added to the scores, and it is not causal by itself; it rounds to float32."""
    model, tokens = make(kind, dtype=torch.float64), draw(2, 45)
    wanted, _ = read(model, tokens)
    model.transformer.set_attn_implementation("eager")
    close(read(model, tokens)[0], wanted, 1e-4)
    by_one = [read(model, tokens[:, :1])]
    for t in range(1, 45):
        by_one.append(read(model, tokens[:, t : t + 1], by_one[-1][1]))
    close(torch.cat([logits for logits, _ in by_one], 1), wanted, 1e-4)


def test_other_attention_is_refused():
    model = make("llama")
    model.transformer.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError) as error:
        read(model, draw(1, 5))
    one_line(error, "attn_implementation = 'flex_attention': must be sdpa or eager")


def test_state_has_the_heads_of_keys():
    state = make("qwen3").init_state(2)
    assert state.kv.shape == (2, 3, 2, 2, W + 1, 16)
    assert make("gemma").init_state(2).kv.shape == (2, 3, 2, 1, W + 1, 16)


@pytest.mark.parametrize("key_of, ahead", [("previous", 1), ("token", 0)])
@every_kind
def test_notebook_starts_as_a_nearest_neighbour(kind, key_of, ahead, edm_tokenizer):
    """It finds the nearest h and hands on the one that followed, or that one itself."""
    config = oracle.edm_config(edm_heads=0, key_width=0, key_of=key_of, pointing=False)
    model = eg.build_model(base_of(kind, edm_tokenizer), config, "edm", 0)
    edm, h = model.edm, torch.randn(2, 12, 32)
    assert (edm.heads, edm.width) == (4, 8)  # together as wide as h
    edm.alpha.data.fill_(50.0)
    edm.top_k = 1
    with torch.no_grad():
        _, state, _ = edm(h, edm.init_state(2))
        added, slots, _ = edm.read(h[:, 3:7], state, [])
    assert (slots[..., 0] == torch.arange(3, 7) + ahead).all()
    close(added, edm.norm(h[:, 3 + ahead : 7 + ahead]), 1e-4)


# ══ Cuts, padding, generation ════════════════════════════════════════════════════════════════════
@every_kind
@pytest.mark.parametrize("cut", [(1, 7, 20, 2, 1, 23), (1,) * 54], ids=["uneven", "by one"])
def test_cuts_equal_all_at_once(kind, cut):
    model, tokens = make(kind, dtype=torch.float64, stride=5), draw(2, 54)
    whole, last = read(model, tokens)
    cache, parts = None, []
    for part in tokens.split(cut, 1):
        logits, cache = read(model, part, cache)
        parts.append(logits)
    close(torch.cat(parts, 1), whole, 1e-10)
    same_memory(cache.state, last.state, 1e-6)


@every_kind
def test_left_padding_changes_nothing(kind):
    """Rows of several lengths, one shorter than a window, in two calls."""
    model, tokens, lengths = make(kind, dtype=torch.float64), draw(3, 50), (50, 7, 33)
    mask = torch.stack([torch.arange(50) >= 50 - length for length in lengths]).long()
    first, cache = read(model, tokens[:, :29], attention_mask=mask[:, :29])
    second, cache = read(model, tokens[:, 29:], cache, attention_mask=mask)
    logits = torch.cat([first, second], 1)
    for row, length in enumerate(lengths):
        alone, own = read(model, tokens[row : row + 1, 50 - length :])
        close(logits[row, 50 - length :], alone[0], 1e-10)
        same_memory(own.state, oracle.row_of(cache.state, row), 1e-10)


def generate(model, tokens, count: int, **options):
    return model.generate(tokens, max_new_tokens=count, pad_token_id=0,
                          **{"do_sample": False, **options})


@every_kind
def test_generate_past_the_window_equals_one_pass(kind):
    """Greedy, of a padded batch too."""
    model, prompt = make(kind, dtype=torch.float64), draw(2, 9)
    tokens = generate(model, prompt, 40)
    best = read(model, tokens[:, :-1])[0].argmax(-1)
    assert torch.equal(tokens[:, 9:], best[:, 8:])
    assert len(tokens[:, 9:].unique()) > 3
    padded = F.pad(prompt, (5, 0))
    mask = (torch.arange(14) >= 5).long().expand(2, -1)
    assert torch.equal(generate(model, padded, 40, attention_mask=mask)[:, 14:], tokens[:, 9:])


@pytest.mark.parametrize("kind", ["llama", "untied", "gemma"])
def test_beams_equal_a_naive_search(kind):
    """Three, across the end of a window."""
    model, prompt = make(kind, dtype=torch.float64), draw(1, 11)
    alive = [(0.0, prompt[0].tolist())]
    for _ in range(12):
        p = read(model, torch.tensor([ids for _, ids in alive]))[0][:, -1].log_softmax(-1)
        grown = [(score + float(p[i, token]), [*ids, token])
                 for i, (score, ids) in enumerate(alive) for token in range(V)]
        alive = sorted(grown, reverse=True)[:3]
    beams = generate(model, prompt, 12, num_beams=3, num_return_sequences=3)
    assert beams.tolist() == [ids for _, ids in alive]


@every_kind
def test_tokens_of_any_whole_numbers_and_columns_that_are_kept(kind):
    model, tokens, some = make(kind), draw(2, 40), torch.tensor([3, 39, 0])
    wanted, _ = read(model, tokens)
    assert torch.equal(read(model, tokens.int())[0], wanted)
    close(read(model, tokens, logits_to_keep=some)[0], wanted[:, some], 1e-6)
    assert model(tokens, labels=tokens.int()).loss == model(tokens, labels=tokens).loss


@every_kind
def test_return_dict_false_gives_a_tuple(kind):
    model, tokens = make(kind), draw(2, 40)
    scores, cache = model(tokens, return_dict=False)
    assert torch.equal(scores, model(tokens).logits) and cache.get_seq_length() == 40


@every_kind
def test_inputs_that_do_not_fit_are_refused(kind):
    """A mask of other columns; a cache of other rows, or of transformers' own; outputs that there
    are none of."""
    model, tokens = make(kind), draw(2, 12)
    _, cache = read(model, tokens)
    with pytest.raises(ValueError, match=r"^attention_mask: \(2, 3\); must be of the 12 new col"):
        model(tokens, attention_mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="of 2 rows, but input_ids has 1; hand over as many rows"):
        read(model, tokens[:1], cache)
    for use in (read, lambda *given: generate(*given[:2], 5, **{em.CACHE: given[2]})):
        with pytest.raises(ValueError, match="of type DynamicCache; must be what an earlier call"):
            use(model, tokens, DynamicCache())
    with pytest.raises(ValueError, match="output_attentions: not used by EDMForCausalLM"):
        generate(model, tokens, 5, output_attentions=True)


# ══ Saved folders, memory files ══════════════════════════════════════════════════════════════════
ELSEWHERE = """
import importlib.util, pickle, sys
import torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, pipeline
assert importlib.util.find_spec("dnc_gpt2") is None
folder, results = sys.argv[1], {}
for kind in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder + "/" + kind, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder + "/" + kind, trust_remote_code=True)
    for parameter in model.parameters():  # to aligned memory, as in the process that saved it
        parameter.data = parameter.data.clone()
    module = sys.modules[type(model).__module__]
    tokens, prompt = torch.load(folder + "/tokens.pt")
    payload = torch.load(folder + "/" + kind + ".pt", weights_only=True)
    state = module.unpack_memory(payload, model)
    assert type(pickle.loads(pickle.dumps(model))) is type(model)  # as to another process
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        results[kind] = {
            "logits": model(tokens).logits,
            "later": model(tokens[:, :40], past_key_values=module.StateCache(state)).logits,
            "greedy": model.generate(prompt, streamer=TextStreamer(tokenizer), **options),
            "trained": sorted(n for n, p in model.named_parameters() if p.requires_grad)}
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    results[kind]["said"] = pipe("the city", **options)[0]["generated_text"]
torch.save(results, folder + "/results.pt")
"""


@pytest.mark.slow
def test_saved_folders_go_on_elsewhere_bit_for_bit(edm_tokenizer, tmp_path):
    """In a process in another folder, without this repository: model, memory file, streamer,
    pipeline. The tokenizer's end token was in no vocabulary: each base gets a row for it."""
    tokens, prompt, wanted = draw(2, 50), draw(1, 30, seed=3, low=1, high=50), {}
    torch.save((tokens, prompt), tmp_path / "tokens.pt")
    for kind in KINDS:
        base = base_of(kind, edm_tokenizer)
        model = eg.build_model(base, oracle.edm_config(), "both", 0).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("alpha"):
                    parameter.fill_(0.5)
        eg.save_model(model, base, tmp_path / kind)
        model.config.stride = W // 2  # as generation has it
        logits, cache = read(model, tokens)
        eg.save_memory(cache.state, model, tmp_path / f"{kind}.pt")
        later, _ = read(model, tokens[:, :40], cache)
        greedy = generate(model, prompt, 30, eos_token_id=None)
        wanted[kind] = {"logits": logits, "later": later, "greedy": greedy,
                        "trained": sorted(memories(model))}

    (tmp_path / "cwd").mkdir()
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1",
           "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, str(tmp_path), *KINDS],
                          cwd=tmp_path / "cwd", env=env, text=True, capture_output=True,
                          timeout=240)
    assert done.returncode == 0, done.stderr
    results = torch.load(tmp_path / "results.pt")
    for kind, own in wanted.items():
        for name in ("logits", "later", "greedy"):
            assert torch.equal(results[kind][name], own[name]), (kind, name)
        assert results[kind]["trained"] == own["trained"] and len(own["trained"]) > 20
        assert results[kind]["said"].startswith("the city")


@every_kind
def test_save_pretrained_comes_back_bit_for_bit(kind, tmp_path):
    model, tokens = make(kind), draw(2, 40)
    model.save_pretrained(tmp_path)
    loaded, info = em.EDMForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for parameter in loaded.parameters():
        parameter.data = parameter.data.clone()
    assert torch.equal(read(loaded, tokens)[0], read(model, tokens)[0])
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == set(memories(loaded))


@every_kind
def test_resized_model_is_saved_and_comes_back(kind, tmp_path):
    """With its head, where that is another matrix; the base stays frozen."""
    model, tokens = make(kind, pointing=False), draw(2, 21)
    before, _ = read(model, tokens)
    model.resize_token_embeddings(V + 3)
    assert model.config.vocab_size == model.config.base["vocab_size"] == V + 3
    model.save_pretrained(tmp_path)
    loaded = em.EDMForCausalLM.from_pretrained(tmp_path).eval()
    (resized, _), (again, _) = read(model, tokens), read(loaded, tokens)
    assert resized.shape[-1] == V + 3 and torch.equal(resized, again)
    among = resized[..., :V].log_softmax(-1)  # the new rows take their part from all alike
    close(among, before.log_softmax(-1))
    for one in (model, loaded):
        assert {name for name, p in one.named_parameters() if p.requires_grad} == set(memories(one))


def test_memory_of_another_head_is_refused():
    model = make("untied")
    payload = em.pack_memory(read(model, draw(1, 40))[1].state, model)
    same_bits(em.unpack_memory(payload, model), read(model, draw(1, 40))[1].state)
    with torch.no_grad():
        model.lm_head.weight[3, 5] += 1
    with pytest.raises(ValueError, match="another"):
        em.unpack_memory(payload, model)


@pytest.mark.parametrize("eos, wanted", [(3, 3), ([4, 5], 4), (None, V), (96, V)])
def test_end_token_is_the_base_s_own(edm_tokenizer, eos, wanted):
    """Where the base names none that its tokenizer has, embedding and head get a row, the mean."""
    base = base_of("untied", edm_tokenizer, eos_token_id=eos)
    model = eg.build_model(base, oracle.edm_config(), "edm", 0)
    known = edm_tokenizer.get_vocab_size()
    wanted = known if wanted == V else wanted
    tokenizer = eg.give_end_token(model, base)
    assert tokenizer.eos_token_id == model.config.eos_token_id == wanted
    assert len(model.lm_head.weight) == len(model.decoder.embedding.weight) == V

    short = base_of("untied", edm_tokenizer, vocab_size=known)
    model = eg.build_model(short, oracle.edm_config(), "edm", 0)
    eg.give_end_token(model, short)
    for weight, before in ((model.lm_head.weight, short.head),
                           (model.decoder.embedding.weight, short.weights["embed_tokens.weight"])):
        assert torch.equal(weight[:known], before)
        close(weight[known], before.mean(0), 1e-6)
    assert read(model, torch.tensor([[known]]))[0].shape == (1, 1, known + 1)


# ══ Adapters ═════════════════════════════════════════════════════════════════════════════════════
@every_kind
def test_lora_targets_are_those_of_its_kind(kind, edm_tokenizer):
    """peft's map; the user's own names go before it."""
    base = base_of(kind, edm_tokenizer)
    for fields, wanted in (({}, {"q_proj", "v_proj"}),
                           ({"lora_targets": "o_proj, down_proj"}, {"o_proj", "down_proj"})):
        config = oracle.edm_config(lora=2, **fields)
        model = eg.build_model(base, config, "edm", 0)
        adapters = [name for name, _ in model.named_parameters() if "lora_A" in name]
        assert {name.split(".")[-4] for name in adapters} == wanted and len(adapters) == 2 * 3
    assert eg.lora_targets(oracle.edm_config(), "gpt2") == ["c_attn", "c_proj"]


def test_lora_refuses_a_target_that_the_base_has_not(edm_tokenizer):
    with pytest.raises(ValueError) as error:
        eg.build_model(base_of("llama", edm_tokenizer),
                       oracle.edm_config(lora=2, lora_targets="c_attn"), "edm", 0)
    one_line(error, "lora_targets = 'c_attn'", "q_proj")
    with pytest.raises(ValueError) as error:
        eg.lora_targets(oracle.edm_config(), "unheard")
    one_line(error, "lora_targets = 'auto'", "unheard")


@pytest.mark.parametrize("low", [False, True], ids=["lora", "qlora"])
def test_adapters_train_merge_and_come_back(edm_tokenizer, tmp_path, low):
    """The base in 4 bits too, of widths that are multiples of 64; an untied head stays plain."""
    base = base_of("untied", edm_tokenizer, hidden_size=64, intermediate_size=128)
    model = eg.build_model(base, oracle.edm_config(lora=2, qlora=low), "edm", 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokens = draw(2, 40)
    model.train()(tokens, labels=tokens).loss.backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05).step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in changed if "lora_B" in name} and "edm.alpha" in changed
    assert changed <= set(memories(model)) | {name for name in before if "lora_" in name}
    logits, _ = read(model.eval(), tokens)
    alone = eg.build_model(base, oracle.edm_config(lora=2, qlora=low), "base", 0)
    for some in (model, alone):  # the base that is compared with is the same
        kinds = {type(layer).__name__ for layer in some.transformer.layers[0].mlp.modules()}
        assert ("Linear4bit" in kinds) == low and type(some.lm_head) is nn.Linear
    plain = eg.build_model(base, oracle.edm_config(), "base", 0)
    assert eg.count_weights(alone)["parameters"] == eg.count_weights(plain)["parameters"]

    model.save_pretrained(tmp_path)
    loaded = em.EDMForCausalLM.from_pretrained(tmp_path)
    close(read(loaded, tokens)[0], logits, 1e-5)
    model.merge_lora()
    close(read(model, tokens)[0], logits, 1e-4)


def test_qlora_refuses_a_width_that_is_no_block(edm_tokenizer):
    base = base_of("llama", edm_tokenizer, hidden_size=64, intermediate_size=96)
    with pytest.raises(ValueError) as error:
        eg.build_model(base, oracle.edm_config(lora=2, qlora=True), "edm", 0)
    one_line(error, "qlora: down_proj of the base is 96 wide", "64")


# ══ Training ═════════════════════════════════════════════════════════════════════════════════════
@every_kind
def test_training_changes_the_memories_alone(kind, edm_tokenizer):
    """A few steps; every weight of the notebook moves, and the base's loss is that of its head."""
    from types import SimpleNamespace

    base, stream = base_of(kind, edm_tokenizer), draw(400)
    corpus = SimpleNamespace(train=stream)
    model, history, _ = eg.train_arm(base, corpus, oracle.edm_config(), "both", 0)
    start = eg.build_model(base, oracle.edm_config(), "both", 0).state_dict()
    weights = model.state_dict()
    still = {name for name, weight in weights.items() if torch.equal(weight, start[name])}
    frozen = {name for name in start if name.startswith(("transformer.", "lm_head."))}
    assert frozen <= still
    # A key's bias is of no use where every key has it; it moves by rounding alone, or not at all.
    assert still - frozen <= {"edm.key.bias"} and len(history) == 2

    plain, bare = make_decoder(kind), eg.build_model(base, oracle.edm_config(), "base", 0).eval()
    nll = eg.evaluate(bare, stream[: W + 1], 1)
    with torch.no_grad():
        logits = plain(stream[None, :W]).logits[0]
    wanted = F.cross_entropy(logits, stream[1 : W + 1], reduction="none")
    close(nll[0], wanted, 1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_gradient_equals_finite_differences(kind):
    """Central, along a random direction of each parameter. Steps are wide, as these bases normalise
    in float32 whatever the weights are in; every slot is read, as the nearest few would change."""
    model = make(kind, 0.5, torch.float64, bptt_segments=1000, stride=5, read_top_k=32, late=False)
    tokens = draw(2, 34)
    given = {"input_ids": tokens, "labels": tokens}
    oracle.check_slopes(model, memories(model), given, step=4e-3, rel=2e-2, abs_=5e-5)
    assert all(p.grad is None for p in model.transformer.parameters())


# ══ Refusals ═════════════════════════════════════════════════════════════════════════════════════
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
             "long_factor": [2.0] * 4, "factor": 2.0, "original_max_position_embeddings": 8}
MISFITS = [
    ("mistral", {"sliding_window": 15}, "window = 16: must be at most the 15 tokens"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
     "window = 16: must be at most the 9 tokens"),
    ("llama", {"max_position_embeddings": 15}, "window = 16: must be "),
    ("llama", {"rope_parameters": LONG_ROPE}, "window = 16: must be at most 8"),
    ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True: must be"),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config: must be"),
]


@pytest.mark.parametrize("kind, fields, named", MISFITS)
def test_a_base_that_does_not_fit_is_refused(kind, fields, named):
    """Before its weights are loaded, and where a model is built."""
    settings = AutoConfig.for_model(**SHAPE | KINDS[kind] | fields)
    with pytest.raises(ValueError) as error:
        eg.check_base("x", settings, oracle.edm_config())
    one_line(error, named)
    with pytest.raises(ValueError) as error:
        em.EDMForCausalLM(em.EDMConfig(base=settings.to_dict(), **TINY))
    one_line(error, named)


def test_a_kind_that_is_not_run_is_refused():
    for kind in ("opt", "gemma2", None):
        with pytest.raises(ValueError) as error:
            em.EDMConfig(base={"model_type": kind})
        one_line(error, f"base: model_type = {kind!r}: must be one of llama, ")
    with pytest.raises(ValueError) as error:
        eg.check_base("x", AutoConfig.for_model("gemma2"), oracle.edm_config())
    one_line(error, "base = 'x': must be a GPT-2, or one of llama", "(this is gemma2)")


def test_sliding_window_as_long_as_the_window_is_taken():
    """A layer of which no mask is ever shorter than the window; Qwen2 has it off by default."""
    for kind, fields in (("mistral", {"sliding_window": W}), ("mistral", {"sliding_window": None}),
                         ("qwen2", {"sliding_window": 4})):
        settings = AutoConfig.for_model(**SHAPE | KINDS[kind] | fields)
        eg.check_base("x", settings, oracle.edm_config())


# ══ The command ══════════════════════════════════════════════════════════════════════════════════
@pytest.fixture(scope="module")
def folder(edm_tokenizer, tmp_path_factory):
    """A folder of text, and one of each of two bases with a tokenizer."""
    folder = tmp_path_factory.mktemp("decoders")
    (folder / "text").mkdir()
    for name, times in (("train", 90), ("valid", 30), ("test", 30)):
        text = "the city was built on a hill by the river and the sea\n" * times
        (folder / "text" / f"{name}.txt").write_text(text)
    for kind in ("llama", "untied"):
        make_decoder(kind).to(torch.bfloat16).save_pretrained(folder / kind)
        PreTrainedTokenizerFast(tokenizer_object=edm_tokenizer).save_pretrained(folder / kind)
    return folder


@pytest.mark.parametrize("kind", ["llama", "untied"])
def test_load_base_takes_what_a_folder_holds(folder, kind):
    """In float32, whatever the folder has it in."""
    base = eg.load_base(oracle.edm_config(base=str(folder / kind)))
    model, tokens = eg.build_model(base, oracle.edm_config(), "base", 0).eval(), draw(2, W)
    plain = AutoModelForCausalLM.from_pretrained(folder / kind, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(read(model, tokens)[0], plain(tokens).logits)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def run(folder, monkeypatch, **fields) -> int:
    monkeypatch.chdir(folder)
    options = {"dataset": "text", "max_steps": 2, "eval_rows": 2, "recall_rows": 2, "topic_rows": 2,
               "new_tokens": 5, "arms": "edm"}
    return eg.main(flags(RUN | options | fields))


def test_command_measures_saves_and_goes_on(folder, monkeypatch, capsys):
    """The longer window is bounded, and the table says so; then --generate with a memory file."""
    assert run(folder, monkeypatch, base="untied", full_window=32) == 0
    out = capsys.readouterr().out
    assert "A frozen llama" in out and "base, window 32" in out
    assert "window of 32, as many of\n  its 64 positions as --full_window says" in out
    for _ in range(2):
        assert eg.main(["--generate", "the sea", "--memory_file", "notebook.pt"]) == 0
        assert "goes on" in capsys.readouterr().out


@pytest.mark.parametrize("fields, remedy", [
    ({"window": 64, "slots": 64}, "--window"), ({"full_window": 16}, "--full_window")])
def test_command_without_a_longer_window_says_so(folder, monkeypatch, capsys, fields, remedy):
    """At the start, and in a table without that row."""
    assert run(folder, monkeypatch, base="llama", **fields) == 0
    out = capsys.readouterr().out
    compared = next(line for line in out.splitlines() if line.startswith("  compared"))
    assert remedy in compared and out.index("  compared") < out.index("Perplexity")
    assert out.count("base, window") == 1 and "no longer window to compare with" in out


def test_command_refuses_a_base_in_one_line(folder, monkeypatch, capsys):
    assert run(folder, monkeypatch, base="llama", window=65, slots=65) == 2
    assert "window = 65" in error_line(capsys.readouterr().err)


def test_auto_passes_over_a_baseline_without_a_longer_window(edm_base, monkeypatch, capsys):
    """Of two baselines the newest whose window is longer; where there is none one is trained."""
    positions = {"short.pt": 16, "long.pt": 64}

    def base_of_checkpoint(path, config):
        return edm_base._replace(name=path, config=edm_base.config | {"n_positions":
                                                                       positions[path]})

    def no_hub(name, config):
        raise ValueError("no hub")

    monkeypatch.setattr(eg, "base_of_model", no_hub)
    monkeypatch.setattr(eg, "base_of_checkpoint", base_of_checkpoint)
    monkeypatch.setattr(eg, "newest_baselines", lambda folder: list(positions))
    assert eg.choose_base(oracle.edm_config()).name == "long.pt"
    assert "passed over short.pt" in capsys.readouterr().out
    monkeypatch.setattr(eg, "newest_baselines", lambda folder: ["short.pt"])
    monkeypatch.setattr(eg, "packaged_file", lambda: None)
    monkeypatch.setattr(eg, "train_baseline", lambda **fields: "long.pt")
    assert eg.choose_base(oracle.edm_config()).name == "long.pt"
    assert "has a window longer than 16" in capsys.readouterr().out
    assert dnc_gpt2.END == "<|endoftext|>"

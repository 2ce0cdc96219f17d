"""Tokenizers: loaded from Hugging Face folders, or learned from the data at hand."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpo_jax.core.files import inside, read_json, refuse_gguf
from rpo_jax.data.hub import cached_folder, download_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# The paper's tags. A tokenizer without BOS renders `bos_token` as nothing; with one, other programs that render
# the template and add no special tokens (the convention for chat templates) see what training saw.
DEFAULT_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
ROLE_TAGS = ("<|system|>", "<|user|>", "<|assistant|>")
SPECIAL_TOKENS = (PAD, BOS, EOS, *ROLE_TAGS)
NUM_BYTES = 256

# Any of these holds a vocabulary; transformers builds an empty tokenizer from a folder that has only a config.json.
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
HUB_PATTERNS = ("*.json", "*.model", "*.txt", "*.jinja")

MAX_TOKENS = 1 << 24
MAX_FILE_BYTES = 1 << 28
MAX_TOKEN_CHARACTERS, MAX_ADDED_CHARACTERS = 1 << 14, 256  # of one token; of one that is looked for in every text
MAX_GROWTH = 8  # of a token's text by the rules that decode it
# Of tokenizer_config.json: what transformers 5 notes there of how a tokenizer was loaded, which is no part of it.
LOADING_SETTINGS = ("backend", "is_local", "local_files_only")
# Of tokenizer_config.json: what transformers would take code, arguments or a path of its choice from.
REFUSED_SETTINGS = ("auto_map", "init_inputs", "gguf_file", "tokenizer_object", "__slow_tokenizer")


def load_tokenizer(folder_or_hub_name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder or hub repository; runs no code that the folder brings.

    Raises ValueError where there is no vocabulary or it cannot be read.
    """
    from transformers import AutoTokenizer

    folder = tokenizer_folder(str(folder_or_hub_name))
    if not has_vocabulary(folder):
        refuse_gguf(folder)
        raise ValueError(
            f"{folder} holds no tokenizer (none of {', '.join(VOCABULARY_FILES)}); copy the model's tokenizer files "
            "there, or name a folder that has them."
        )
    _check_files(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        vocabulary = tokenizer.get_vocab()
        added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # what a damaged file raises is not one kind; a panic of Rust's is no Exception
        reason = f"{type(error).__name__}: {error}"[:1000]
        raise ValueError(
            f"The tokenizer in {folder} cannot be read ({reason}); fetch its files again, or name another folder."
        ) from error
    largest = max(vocabulary.values(), default=0)
    if largest >= MAX_TOKENS:
        raise ValueError(f"The tokenizer in {folder} has a token of id {largest:,}; no vocabulary is that large.")
    for tokens, most in ((vocabulary, MAX_TOKEN_CHARACTERS), (added, MAX_ADDED_CHARACTERS)):
        if (longest := max(map(len, tokens), default=0)) > most:
            raise ValueError(f"The tokenizer in {folder} has a token of {longest:,} characters; none needs that many.")
    _check_decoder(tokenizer, folder)
    return tokenizer


def _check_decoder(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """ValueError for rules that could make much of few tokens; those that are decoded here are simple."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    waiting, growth = [], 1.0
    if backend is not None and backend.decoder is not None:
        waiting.append(json.loads(backend.decoder.__getstate__()))
    while waiting:
        rule = waiting.pop()
        waiting += rule.get("decoders", [])
        if rule.get("type") == "Replace":
            pattern = rule["pattern"].get("String")
            growth *= max(1.0, len(rule["content"]) / len(pattern)) if pattern else float("inf")
    if growth > MAX_GROWTH:
        raise ValueError(
            f"The tokenizer in {folder} decodes by expressions, or makes more than {MAX_GROWTH} characters of one; use "
            "one that you trust."
        )


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], **settings: Any) -> str:
    """The text of token ids; ValueError where the tokenizer's library fails on them."""
    try:
        return str(tokenizer.decode(list(ids), **settings))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of Rust's is no Exception
        raise ValueError(f"the tokenizer cannot decode its own tokens: {type(error).__name__}: {error}") from None


def _check_files(folder: Path) -> None:
    """ValueError for files that lie elsewhere, and for a configuration that would have others read or code run."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; name the folder that holds the tokenizer.")
    files = [file for pattern in (*HUB_PATTERNS, "*/*.jinja") for file in folder.glob(pattern)]
    for file in files:
        if inside(folder, file.relative_to(folder).as_posix()).stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"{file} is larger than {MAX_FILE_BYTES:,} bytes; no tokenizer needs such a file.")
    if not (folder / "tokenizer_config.json").is_file():
        return
    settings = read_json(folder, "tokenizer_config.json")
    named = sorted(name for name in REFUSED_SETTINGS if settings.get(name))
    if named:
        raise ValueError(
            f"{folder / 'tokenizer_config.json'} sets {', '.join(named)}, which names code or files to load beside the "
            "tokenizer's own; nothing of that kind is loaded: remove it if the tokenizer works without."
        )


def tokenizer_folder(name: str) -> Path:
    """The local folder of a tokenizer: itself, or of the hub's repository of that name, downloaded once."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    cached = cached_folder(name)
    return cached if cached and has_vocabulary(cached) else download_folder(name, HUB_PATTERNS)


def has_vocabulary(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((folder / file).is_file() for file in VOCABULARY_FILES)


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: str | Path) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE of at most `vocab_size` tokens from `texts` and save it to `folder`.

    It encodes any text without loss, puts <s> in front as Llama's does, and carries DEFAULT_CHAT_TEMPLATE. The same
    texts give the same files. Raises ValueError where `vocab_size` does not hold all bytes and special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    smallest = NUM_BYTES + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size={vocab_size} cannot hold the {NUM_BYTES} bytes and {len(SPECIAL_TOKENS)} special tokens; "
            f"use {smallest} or more."
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=list(ROLE_TAGS),
        clean_up_tokenization_spaces=False,
        chat_template=DEFAULT_CHAT_TEMPLATE,
    )
    _save(tokenizer, Path(folder).expanduser())
    return tokenizer


def _save(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # Beside first, the vocabulary last: a folder that has it is complete, whenever the run is stopped.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as new:
        tokenizer.save_pretrained(new)
        make_portable(Path(new))
        for file in sorted(Path(new).iterdir(), key=lambda path: path.name == "tokenizer.json"):
            os.replace(file, folder / file.name)


def make_portable(folder: Path) -> None:
    """Rewrite tokenizer_config.json where transformers 4 could not read what 5 wrote; 5 reads both alike.

    4 knows TokenizersBackend by its older name, and a list of further special tokens as additional_special_tokens.
    """
    name = "tokenizer_config.json"
    if not (folder / name).is_file():
        return
    settings = read_json(folder, name)
    portable = {key: value for key, value in settings.items() if key not in LOADING_SETTINGS}
    if portable.get("tokenizer_class") == "TokenizersBackend":
        portable["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(portable.get("extra_special_tokens"), list):
        portable["additional_special_tokens"] = portable.pop("extra_special_tokens")
    if isinstance(named := portable.pop("model_specific_special_tokens", None), dict):
        portable["extra_special_tokens"] = named
    if portable != settings:
        content = json.dumps(portable, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (folder / name).write_text(content, encoding="utf-8")


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over all that decides how text becomes ids: vocabulary and rules, chat template, special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # absent from tokenizers written in Python
    rules = json.loads(backend.to_str()) if backend is not None else {"vocabulary": tokenizer.get_vocab()}
    for state in ("truncation", "padding"):  # left behind by the last call, no part of the tokenizer
        rules.pop(state, None)
    parts = [rules, tokenizer.chat_template, {name: str(tok) for name, tok in tokenizer.special_tokens_map.items()}]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def padding_id(tokenizer: PreTrainedTokenizerBase, rows: int) -> int:
    """The token that rows of a batch end with where they are shorter: the end token where there is none for it.

    Args:
        rows: of the embedding; a padding token beyond them is none.
    """
    token_id = tokenizer.pad_token_id
    if not isinstance(token_id, int) or token_id >= rows:
        token_id = tokenizer.eos_token_id
    assert isinstance(token_id, int), "a tokenizer without EOS is refused with the data"
    return token_id

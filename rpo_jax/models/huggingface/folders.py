"""Model folders on disk: local or from the hub, their safetensors files, tokenizer files."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors

from rpo_jax.core.files import inside, read_json, refuse_gguf
from rpo_jax.data.hub import newest_folder
from rpo_jax.data.tokenizer import VOCABULARY_FILES, has_vocabulary, make_portable

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WEIGHTS_NAME = re.compile(r"[\w-][\w.-]{0,200}\.safetensors")
# The weights once more in their maker's own format, as in gpt-oss's and Mistral's repositories.
_SECOND_COPIES = ("consolidated*.safetensors", "*/*.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.npy", "*.npz")


def resolve_folder(path: str | Path) -> Path:
    """The local folder of `path`: itself, or the hub's model of that name, downloaded once (no pickles)."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        refuse_gguf(folder)
        raise ValueError(f"{path} is a file; give the folder that holds config.json and the weights.")
    if not _HUB_NAME.fullmatch(str(path)):
        raise ValueError(f"There is no model folder {path}; give an existing folder or a hub name such as org/model.")
    try:
        return newest_folder(str(path), ["*.safetensors", "*.json", "README.md", *TOKENIZER_FILES], _SECOND_COPIES)
    except Exception as error:  # whatever keeps the hub from answering, the user can do the same about it
        raise ValueError(
            f"There is no folder {path}, and the Hugging Face hub did not give a model of that name "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}). "
            "Give a local folder, or download the model where the hub can be reached."
        ) from error


class Stored(NamedTuple):
    """Where a tensor is: its file, and its name there."""

    file: Path
    name: str

    def described(self) -> tuple[tuple[int, ...], str]:
        """Its shape, and its dtype by safetensors' name."""
        with safetensors.safe_open(self.file, "numpy") as stored:
            view = stored.get_slice(self.name)
            return tuple(view.get_shape()), view.get_dtype()

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        with safetensors.safe_open(self.file, "numpy") as stored:
            return stored.get_slice(self.name)[index]


def safetensors_files(folder: Path) -> dict[str, Path]:
    """For each tensor of a folder the file that holds it; one file, or several with an index.

    The library checks a file's header when it opens it: sizes, dtypes, and that the tensors fill the file without
    gaps and overlaps. Nothing is allocated for them.
    """
    index = _read_index(folder)
    files: dict[str, Path] = {}
    for name in sorted(set(index.values())) if index is not None else [WEIGHTS]:
        if not _WEIGHTS_NAME.fullmatch(name):
            raise ValueError(f"{folder / WEIGHTS_INDEX} names {name[:100]!r}, which is no safetensors file beside it.")
        file = inside(folder, name)
        if not file.is_file():
            raise ValueError(f"{folder / WEIGHTS_INDEX} names {name}, which is not there; copy the folder again.")
        try:
            with safetensors.safe_open(file, "numpy") as tensors:
                keys = list(tensors.keys())
        except safetensors.SafetensorError as error:
            raise ValueError(f"{file} is not a complete safetensors file ({error}); copy it again.") from None
        for key in keys:
            if index is not None and index.get(key) != name:
                raise ValueError(f"{file} holds {key!r}, which {WEIGHTS_INDEX} places in {index.get(key)}.")
            files[key] = file
    absent = sorted(set(index or ()) - set(files))
    if absent:
        raise ValueError(f"{folder / WEIGHTS_INDEX} names {some(absent)}, which its files do not hold.")
    return files


def _read_index(folder: Path) -> dict[str, str] | None:
    """The index of a sharded folder, None where there is a single file; anything else is refused."""
    file = folder / WEIGHTS_INDEX
    if file.is_file():
        try:
            index = dict(read_json(folder, WEIGHTS_INDEX)["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is not a safetensors index: {type(error).__name__}: {error}.") from None
        wrong = [key for key, name in index.items() if not isinstance(name, str)]
        if wrong:
            raise ValueError(f"{file} is not a safetensors index: the file of {some(wrong)} is no text.")
        return index
    if (folder / WEIGHTS).is_file():
        return None
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ValueError(
            f"{folder} holds pickled weights ({some(pickles)}), which can run code when read. Convert them once, where "
            'you trust them: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
        )
    refuse_gguf(folder)
    raise ValueError(f"{folder} has neither {WEIGHTS} nor {WEIGHTS_INDEX}: there are no weights to load.")


def copy_tokenizer(tokenizer: Any, target: Path) -> None:
    """Write a tokenizer, its chat template included, from the loaded object, or the files of its folder as they are.

    Only what transformers 4 could not read is written anew.
    """
    if not isinstance(tokenizer, str | Path):
        tokenizer.save_pretrained(target)
        make_portable(target)
        return
    source = Path(tokenizer).expanduser()
    if not has_vocabulary(source):
        raise ValueError(f"{source} holds no tokenizer (none of {', '.join(VOCABULARY_FILES)}).")
    for file in (file for pattern in TOKENIZER_FILES for file in source.glob(pattern)):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(inside(source, str(file.relative_to(source))), copy)
    make_portable(target)


def some(names: list[str], limit: int = 6) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def folder_fingerprint(folder: Path) -> str:
    """SHA-256 over the files of a model folder's weights; the architecture is told apart by itself."""
    digest = hashlib.sha256()
    for file in sorted(set(safetensors_files(folder).values())):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()

"""Files of Hugging Face hub repositories: from the local cache, else downloaded, and quick to fail offline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

PROBE_SECONDS = 5.0


def cached_folder(name: str) -> Path | None:
    """Folder of the hub repository `name` in the local cache; None where it is not there. Files may be missing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, HFValidationError):
        return None


def download_folder(name: str, patterns: Sequence[str]) -> Path:
    """Download the files of the hub repository `name` that match `patterns`; ValueError where that fails."""
    from huggingface_hub import constants, get_session, snapshot_download

    try:
        # One quick question first: without a connection the hub client retries each file for half a minute.
        get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # the classes of connection errors differ between versions of the hub client
        raise ValueError(
            f"'{name}' is neither a local folder nor in the local hub cache, and fetching it from "
            f"{constants.ENDPOINT} failed ({type(error).__name__}: {error}); give a local folder."
        ) from error

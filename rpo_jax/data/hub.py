"""Files of Hugging Face hub repositories: from the local cache, else downloaded, and quick to fail offline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

PROBE_SECONDS = 5.0


def cached_folder(name: str, revision: str | None = None) -> Path | None:
    """Folder of the hub repository `name` in the local cache; None where it is not there. Files may be missing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (OSError, HFValidationError):
        return None


def download_folder(name: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """Download the files of the hub repository `name` that match `patterns`; ValueError where that fails.

    Args:
        revision: of the repository: a commit, branch or tag; the newest where not given.
    """
    from huggingface_hub import constants, snapshot_download

    try:
        _probe()
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # the classes of connection errors differ between versions of the hub client
        raise ValueError(
            f"'{name}' is neither a local folder nor in the local hub cache, and fetching it from "
            f"{constants.ENDPOINT} failed ({type(error).__name__}: {error}); give a local folder."
        ) from error


def newest_folder(name: str, patterns: Sequence[str], without: Sequence[str] = ()) -> Path:
    """The newest files of a hub repository that match, or without a connection the cached ones; the client's errors.

    Args:
        patterns: as for fnmatch, where a star takes slashes too.
        without: of files that are left out of these.
    """
    from huggingface_hub import snapshot_download

    offline = not is_reachable()
    return Path(
        snapshot_download(
            name, allow_patterns=list(patterns), ignore_patterns=list(without) or None, local_files_only=offline
        )
    )


def newest_file(data_set: str, file: str) -> Path:
    """The newest version of a file of a hub data set, or without a connection the cached one; the client's errors."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(data_set, file, repo_type="dataset", local_files_only=not is_reachable()))


def _probe() -> None:
    """One quick question first: without a connection the hub client retries each file for half a minute."""
    from huggingface_hub import constants, get_session

    get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)


def is_reachable() -> bool:
    """Whether the hub answers at all; found out in seconds."""
    try:
        _probe()
    except Exception:  # of many kinds; without a connection the cache may do
        return False
    return True

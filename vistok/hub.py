"""Files of Hugging Face hub repositories: from the cache, else after one short attempt to reach the hub."""

import logging
import threading
from pathlib import Path
from typing import Any

PREFIX = "hf://"
_TIMEOUT = 5.0  # seconds for the one question whether the hub can be reached
_announced: set[str] = set()
_reached: set[str] = set()  # repositories that the hub answered for
_logger = logging.getLogger("vistok")


def get_file(repo: str, name: str, *, local_files_only: bool = False, **options: Any) -> Path:
    """Return the path of a file of a hub repository (`owner/name`), downloaded if it is not in the cache.

    The first download of a repository is announced by one log line. `options` are `revision` and `cache_dir`.

    Raises:
        EntryNotFoundError: of huggingface_hub; the repository has no such file.
        LocalEntryNotFoundError: the file is not in the cache, and the hub cannot be reached or downloading is
            switched off (`local_files_only`, HF_HUB_OFFLINE).
    """
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    cached = try_to_load_from_cache(repo, name, **options)  # hf_hub_download contacts the hub even for these
    if isinstance(cached, str):
        return Path(cached)
    if cached is not None:
        raise EntryNotFoundError(f"the cache records that {repo} has no {name}")
    if local_files_only or constants.HF_HUB_OFFLINE:
        raise LocalEntryNotFoundError(f"{name} of {repo} is not in the cache, and downloads are switched off")
    announce(repo)
    _check_reachable(repo)
    return Path(hf_hub_download(repo, name, **options))


def announce(repo: str) -> None:
    """Log one line, once per repository, before anything is fetched from it."""
    from huggingface_hub import constants

    if repo not in _announced:
        _announced.add(repo)
        _logger.warning("downloading from the Hugging Face hub: %s/%s", constants.ENDPOINT, repo)


def _check_reachable(repo: str) -> None:
    """Raise LocalEntryNotFoundError if the hub cannot be reached, within seconds."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if repo in _reached:
        return
    failures: list[Exception] = []

    def ask() -> None:
        try:
            HfApi().model_info(repo, timeout=_TIMEOUT)
        except Exception as error:
            failures.append(error)

    # A thread, because the look-up of a host name cannot be given a time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(2 * _TIMEOUT)
    if thread.is_alive():
        raise LocalEntryNotFoundError(f"the hub did not answer within {2 * _TIMEOUT:g} seconds")
    if failures and isinstance(failures[0], HfHubHTTPError):  # the hub answered: no such repository, or gated
        raise failures[0]
    if failures:
        raise LocalEntryNotFoundError(f"the hub cannot be reached ({failures[0]})") from failures[0]
    _reached.add(repo)

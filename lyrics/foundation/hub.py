"""Weights from the Hugging Face hub: a pinned commit, safetensors only, one clear sentence where they are missing."""

import re
from pathlib import Path

from lyrics.errors import InputError
from lyrics.foundation.wheels import Fetched

_COMMIT = re.compile(r"[0-9a-f]{40}")
_TEXT_FILES = ("*.json", "*.txt", "*.model", "README.md", "LICENSE*")
_WEIGHTS = "*.safetensors"
_LICENCES = {
    "google-bert/bert-base-uncased": "Apache-2.0",
    "lmsys/vicuna-13b-v1.5": "Llama 2 Community License",
    "IDEA-Research/grounding-dino-tiny": "Apache-2.0",
    "openai/clip-vit-base-patch32": "MIT",
    "openai/clip-vit-large-patch14": "MIT",
    "facebook/sam-vit-huge": "Apache-2.0",
}


def fetch(name: str, revision: str | None) -> Fetched:
    """A snapshot of a hub repository, from the local cache or through the network.

    Raises:
        InputError: no commit is pinned, the repository cannot be had, or it holds no safetensors.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if revision is None or not _COMMIT.fullmatch(revision):
        raise InputError(
            f"{name} is taken from the hub at revision {revision!r}; pin a commit (40 hex digits) in params/foundation"
        )
    patterns = [*_TEXT_FILES, _WEIGHTS]
    command = f"hf download {name} --revision {revision}"
    try:
        folder = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise InputError(
            f"{name} at {revision[:12]} is not in the hub cache and could not be fetched ({reason}); "
            f"where there is a network run: {command}"
        ) from None
    if not any(folder.glob(_WEIGHTS)):
        raise InputError(
            f"{name} at {revision[:12]} has no *.safetensors, and pickled weights are refused, since loading them can "
            "run code; convert them to safetensors in a repository of yours and name that one"
        )
    return Fetched(name=name, folder=folder, licence=_LICENCES.get(name, "unknown: see the repository"))

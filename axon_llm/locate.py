"""From what a user calls a model to the folder that holds it: a path, the shipped model's name, or a Hub id.

Never imports torch; huggingface_hub only when something must be looked up there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from axon_llm.errors import CheckpointError, ModelNotFound

SHIPPED = ("axon-tiny",)
DEFAULT_MODEL = "axon-tiny"
WEIGHT_FILES = ("model*.safetensors",)  # not "consolidated.safetensors", the same weights again under other names
SMALL_FILES = (
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*\Z")


def locate(name: str | Path, *, weights: bool = True) -> Path:
    """The folder of a model.

    Args:
        name: a folder with a ``config.json``, the name of a shipped model, or ``organisation/name`` on the Hugging Face
            Hub, which is downloaded (with a progress bar on standard error) unless it is in the local cache.
        weights: download them too; otherwise the folder of a model on the Hub may lack them (see ``hub_headers``).

    Raises:
        ModelNotFound: nothing of that name; the hint lists what is there.
    """
    text = str(name)
    if not text:
        raise ModelNotFound("the name of the model is empty", _what_is_there())
    try:
        folder = Path(text).expanduser()
    except RuntimeError:  # ~somebody/… where there is no such user
        raise ModelNotFound(f"no home folder for {text!r}", _what_is_there()) from None
    if (folder / "config.json").is_file():
        return folder
    if text in SHIPPED:
        shipped = shipped_folder() / text
        if (shipped / "config.json").is_file():
            return shipped
        raise ModelNotFound(f"the shipped model {text} is missing from this installation ({shipped})", _what_is_there())
    if folder.is_dir():
        raise ModelNotFound(
            f"{folder} is a folder without a config.json", "A model folder holds config.json and *.safetensors."
        )
    if folder.is_file():
        raise ModelNotFound(f"{folder} is a file", "Give the folder that holds config.json and *.safetensors.")
    if is_hub_id(text):
        return _from_hub(text, (*WEIGHT_FILES, *SMALL_FILES) if weights else SMALL_FILES)
    raise ModelNotFound(f"no model named {text!r}", _what_is_there())


def is_hub_id(name: str | Path) -> bool:
    """Whether this is a model on the Hub: no folder that is here, and spelled like one."""
    text = str(name)
    return bool(_HUB_ID.match(text)) and ".." not in text and not Path(text).exists()


def hub_headers(repo: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name → (dtype as safetensors calls it, shape) of every tensor of a model on the Hub, without downloading it.

    Only the header of each file is asked for, which is some kilobytes.

    Raises:
        CheckpointError: it holds no safetensors files.
        ModelNotFound: there is no such model, or no way to the Hub.
    """
    from huggingface_hub import get_safetensors_metadata

    with _asking_for(repo):
        files = get_safetensors_metadata(repo).files_metadata.values()
    return {name: (tensor.dtype, tuple(tensor.shape)) for file in files for name, tensor in file.tensors.items()}


def shipped_folder() -> Path:
    """Where shipped checkpoints are: the installed package ``axon_weights``, or ``weights/`` of a source tree."""
    spec = find_spec("axon_weights")
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(__file__).resolve().parent.parent / "weights"


def available() -> list[str]:
    """Names that work without a network: shipped models and those in the Hub's local cache, weights included."""
    names = [name for name in SHIPPED if (shipped_folder() / name / "config.json").is_file()]
    try:
        from huggingface_hub import scan_cache_dir

        names += sorted(
            repo.repo_id
            for repo in scan_cache_dir().repos
            if repo.repo_type == "model"
            and any(file.file_name.endswith(".safetensors") for revision in repo.revisions for file in revision.files)
        )
    except Exception:  # no cache folder yet, or no huggingface_hub: nothing to list
        return names
    return names


def _what_is_there() -> str:
    return f"Here: {', '.join(available()) or 'nothing'}; or a folder, a Hub id (organisation/name), or random:SHAPE."


def _from_hub(repo: str, files: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    with _asking_for(repo):
        return Path(snapshot_download(repo, allow_patterns=list(files)))


@contextmanager
def _asking_for(repo: str) -> Iterator[None]:
    """Whatever keeps a model of the Hub from being read is an error of ours."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        NotASafetensorsRepoError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        yield
    except NotASafetensorsRepoError:
        raise CheckpointError(f"{repo} holds no model.safetensors", "Axon reads safetensors only.") from None
    except GatedRepoError:
        raise ModelNotFound(
            f"{repo} is gated", "Accept its licence on the Hub and log in with `hf auth login`."
        ) from None
    except RepositoryNotFoundError:
        raise ModelNotFound(f"the Hub has no model {repo}, or it is private", _what_is_there()) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise ModelNotFound(
            f"{repo} is not in the local cache and cannot be downloaded: {reason}", _what_is_there()
        ) from None
    except Exception as error:  # a transport error of whatever HTTP library is in use
        raise ModelNotFound(
            f"{repo} is not in the local cache and cannot be downloaded ({type(error).__name__})", _what_is_there()
        ) from None

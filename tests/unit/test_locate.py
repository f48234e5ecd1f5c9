"""Finding a model by path, shipped name or Hub id."""

from __future__ import annotations

from functools import partial
from pathlib import Path, PurePath

import pytest
from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import NotASafetensorsRepoError

from axon_llm.errors import CheckpointError, ModelNotFound
from axon_llm.locate import available, hub_headers, is_hub_id, locate, shipped_folder

NAMES = ("model.safetensors.index.json", "config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def test_a_folder_with_a_config_is_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert locate(tmp_path) == tmp_path


def test_the_shipped_model_is_found_by_its_name() -> None:
    assert locate("axon-tiny") == shipped_folder() / "axon-tiny"


@pytest.mark.parametrize(
    "name",
    ["", "nope", "../../etc", "a/b/c", "org/..", "org/na me", "/no/such/place", "hf:x", "~nobody-of-that-name/x"],
)
def test_an_unknown_name_is_an_error_that_lists_what_is_there(name: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        locate(name)
    assert "axon-tiny" in caught.value.hint or "config.json" in caught.value.message + caught.value.hint


def test_a_hub_id_that_cannot_be_reached_says_so_and_lists_what_is_there() -> None:
    with pytest.raises(ModelNotFound, match="not in the local cache") as caught:
        locate("HuggingFaceTB/SmolLM2-135M")
    assert "axon-tiny" in caught.value.hint


def test_weights_are_downloaded_from_the_hub_only_where_they_are_wanted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def download(repo: str, allow_patterns: list[str]) -> str:
        asked.append(
            {name for name in ("model-1-of-2.safetensors", *NAMES) if any(map(PurePath(name).match, allow_patterns))}
        )
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert locate("org/name") == locate("org/name", weights=False) == tmp_path
    assert asked == [{"model-1-of-2.safetensors", *NAMES}, set(NAMES)]


def test_a_hub_model_whose_headers_cannot_be_read_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelNotFound, match="cannot be downloaded"):
        hub_headers("HuggingFaceTB/SmolLM2-135M")

    def refuse(repo: str) -> None:
        raise NotASafetensorsRepoError(repo)

    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", refuse)
    with pytest.raises(CheckpointError, match=r"org/name holds no model\.safetensors"):
        hub_headers("org/name")


def test_a_folder_that_is_spelled_like_a_hub_id_is_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("org/name")
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert not is_hub_id("org/name")


def test_of_the_local_cache_only_models_with_weights_are_said_to_be_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.scan_cache_dir", partial(scan_cache_dir, tmp_path / "hub"))
    for repo, name in (("whole", "model.safetensors"), ("looked-at", "config.json")):
        snapshot = tmp_path / "hub" / f"models--org--{repo}" / "snapshots" / "1"
        snapshot.mkdir(parents=True)
        (snapshot / name).touch()
    assert available() == ["axon-tiny", "org/whole"]


def test_a_folder_without_a_config_and_a_file_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="without a config"):
        locate(tmp_path)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelNotFound, match="is a file"):
        locate(tmp_path / "model.gguf")

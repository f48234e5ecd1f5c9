"""Finding a model by path, shipped name or Hub id."""

from __future__ import annotations

from pathlib import Path

import pytest

from axon_llm.errors import ModelNotFound
from axon_llm.locate import locate, shipped_folder


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def test_a_folder_with_a_config_is_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert locate(tmp_path) == tmp_path


def test_the_shipped_model_is_found_by_its_name() -> None:
    assert locate("axon-tiny") == shipped_folder() / "axon-tiny"


@pytest.mark.parametrize("name", ["", "nope", "../../etc", "a/b/c", "org/..", "org/na me", "/no/such/place", "hf:x"])
def test_an_unknown_name_is_an_error_that_lists_what_is_there(name: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        locate(name)
    assert "axon-tiny" in caught.value.hint or "config.json" in caught.value.message + caught.value.hint


def test_a_hub_id_that_cannot_be_reached_says_so_and_lists_what_is_there() -> None:
    with pytest.raises(ModelNotFound, match="not in the local cache") as caught:
        locate("HuggingFaceTB/SmolLM2-135M")
    assert "axon-tiny" in caught.value.hint


def test_a_folder_without_a_config_and_a_file_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="without a config"):
        locate(tmp_path)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelNotFound, match="is a file"):
        locate(tmp_path / "model.gguf")

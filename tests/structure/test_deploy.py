"""The deployment files fit each other and the program they deploy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from axon_llm.serving.http_settings import SessionManagerSettings
from tests.needs import need_module

yaml = need_module("yaml")

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "k8s"
DOCKERFILE = (ROOT / "deploy" / "docker" / "Dockerfile").read_text(encoding="utf-8")


def documents() -> list[dict[str, Any]]:
    names = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["resources"]
    return [d for name in names for d in yaml.safe_load_all((FOLDER / name).read_text()) if d]


def containers() -> dict[str, dict[str, Any]]:
    return {
        d["metadata"]["name"]: d["spec"]["template"]["spec"]["containers"][0]
        for d in documents()
        if d["kind"] == "Deployment"
    }


def test_there_is_a_deployment_for_each_part_of_the_system() -> None:
    assert containers().keys() == {"gateway", "session-manager", "worker"}


def test_every_image_is_a_target_of_the_dockerfile() -> None:
    targets = set(re.findall(r"^FROM .* AS ([\w-]+)$", DOCKERFILE, re.MULTILINE))
    assert {c["image"].removeprefix("axon-") for c in containers().values()} <= targets


def test_every_axon_variable_is_one_that_the_program_reads() -> None:
    known = {f"AXON_{name.upper()}" for name in SessionManagerSettings.model_fields}
    known |= {f"{name}_FILE" for name in known} | {"AXON_MODEL", "AXON_KERNEL_CACHE"}
    session_manager, worker = containers()["session-manager"], containers()["worker"]
    used = {entry["name"] for c in (session_manager, worker) for entry in c["env"]}
    used |= set(re.findall(r"\b(AXON_[A-Z_]+)=", DOCKERFILE))
    assert used <= known


def test_every_secret_is_mounted_from_a_file_and_named_in_the_instructions() -> None:
    instructions = (FOLDER / "README.md").read_text()
    for document in documents():
        if document["kind"] != "Deployment":
            continue
        volumes = document["spec"]["template"]["spec"]["volumes"]
        secrets = [v["secret"]["secretName"] for v in volumes if "secret" in v]
        assert secrets
        assert all(f"generic {name}" in instructions for name in secrets)
        for entry in document["spec"]["template"]["spec"]["containers"][0]["env"]:
            assert not re.search("SECRET$|_URL$|PASSWORD", entry["name"]), "secrets come from files"


def test_what_runs_as_somebody_can_read_its_secrets() -> None:
    for document in documents():
        if document["kind"] == "Deployment":
            assert document["spec"]["template"]["spec"]["securityContext"]["fsGroup"] > 0


def test_what_answers_clients_waits_to_be_forgotten_before_it_ends() -> None:
    assert all("preStop" in containers()[name]["lifecycle"] for name in ("gateway", "session-manager"))


def test_applying_the_files_again_does_not_undo_scaling() -> None:
    scaled = {d["spec"]["scaleTargetRef"]["name"] for d in documents() if d["kind"] == "ScaledObject"}
    assert scaled == {"worker"}
    for document in documents():
        if document["kind"] == "Deployment":
            assert ("replicas" in document["spec"]) == (document["metadata"]["name"] not in scaled)


def test_selectors_select_what_is_deployed() -> None:
    labels = {
        d["metadata"]["name"]: d["spec"]["template"]["metadata"]["labels"]["app"]
        for d in documents()
        if d["kind"] == "Deployment"
    }
    for document in documents():
        spec = document.get("spec", {})
        if document["kind"] == "Service":
            assert spec["selector"]["app"] in labels.values()
        if document["kind"] == "ScaledObject":
            assert spec["scaleTargetRef"]["name"] in labels

"""The deployment files fit each other and the program they deploy."""

from __future__ import annotations

import json
import re
import subprocess
import sys
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


def pods() -> dict[str, dict[str, Any]]:
    return {d["metadata"]["name"]: d["spec"]["template"]["spec"] for d in documents() if d["kind"] == "Deployment"}


def containers() -> dict[str, dict[str, Any]]:
    return {name: pod["containers"][0] for name, pod in pods().items()}


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
    script = (ROOT / "deploy" / "docker" / "gateway-entrypoint.sh").read_text()
    assert all(f"${{{entry['name']}:-" in script for entry in containers()["gateway"]["env"])


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


def seconds_before_its_end(name: str) -> int:
    command = containers()[name]["lifecycle"]["preStop"]["exec"]["command"]
    assert command[0] == "sleep"
    return int(command[1])


def test_what_answers_clients_waits_to_be_forgotten_before_it_ends() -> None:
    assert seconds_before_its_end("gateway") >= 30  # a load balancer takes its time
    assert seconds_before_its_end("session-manager") > 0


def test_what_ends_has_the_time_it_takes() -> None:
    default = {name: field.default for name, field in SessionManagerSettings.model_fields.items()}
    for name, longest_s in (("gateway", default["job_deadline_s"]), ("session-manager", default["drain_s"])):
        assert pods()[name]["terminationGracePeriodSeconds"] > seconds_before_its_end(name) + longest_s


def test_an_outage_behind_takes_nobody_away_who_can_say_503() -> None:
    for name in ("gateway", "session-manager"):
        assert containers()[name]["readinessProbe"]["httpGet"]["path"] == "/health"
    assert containers()["gateway"]["readinessProbe"]["httpGet"]["port"] == "probes"
    for container in containers().values():
        probes = [probe for name, probe in container.items() if name.endswith("Probe")]
        assert len(probes) >= 2
        assert all(probe["timeoutSeconds"] == 3 for probe in probes)


def test_containers_may_write_where_they_must_and_know_no_token() -> None:
    for name, pod in pods().items():
        assert pod["automountServiceAccountToken"] is False
        security = containers()[name]["securityContext"]
        assert security["readOnlyRootFilesystem"] is True
        assert security["allowPrivilegeEscalation"] is False
    writable = {mount["mountPath"] for mount in containers()["worker"]["volumeMounts"] if not mount.get("readOnly")}
    folders = {match[1] for match in re.finditer(r"\b(?:HF_HOME|\w+_CACHE\w*)=(/\w+)", DOCKERFILE)}
    assert folders == {"/models", "/cache"}
    assert writable == folders | {"/tmp"}
    assert f"install -d -o axon -g axon {' '.join(sorted(folders))}" in DOCKERFILE


def test_a_rollout_of_workers_needs_no_spare_gpu() -> None:
    [worker] = [d for d in documents() if d["kind"] == "Deployment" and d["metadata"]["name"] == "worker"]
    assert worker["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 1, "maxSurge": 0}


def test_nothing_comes_in_but_clients_the_gateway_and_monitoring() -> None:
    policies = [d["spec"] for d in documents() if d["kind"] == "NetworkPolicy"]
    assert {"podSelector": {}, "policyTypes": ["Ingress"]} in policies
    monitoring = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    gateway = {"podSelector": {"matchLabels": {"app": "gateway"}}}
    allowed = {8080: [], 8081: [monitoring], 9100: [monitoring], 8000: [gateway]}
    rules = [rule for policy in policies for rule in policy.get("ingress", [])]
    assert len(rules) == 5
    for rule in rules:
        assert [rule.get("from", []) == allowed[port["port"]] for port in rule["ports"]] == [True]


def test_clients_reach_the_gateway_over_tls_and_with_their_own_addresses() -> None:
    [service] = [d for d in documents() if d["kind"] == "Service" and d["spec"].get("type") == "LoadBalancer"]
    prefix = "service.beta.kubernetes.io/aws-load-balancer-"
    said = {name.removeprefix(prefix): value for name, value in service["metadata"]["annotations"].items()}
    assert [str(port["port"]) for port in service["spec"]["ports"]] == said["ssl-ports"].split(",")
    assert said["ssl-cert"].startswith("arn:aws:acm:")
    assert said["scheme"] == "internet-facing"
    assert said["target-group-attributes"] == "preserve_client_ip.enabled=true"


def test_the_instructions_make_every_secret_from_files_that_exist_by_then(tmp_path: Path) -> None:
    instructions = (FOLDER / "README.md").read_text()
    made = [sys.executable, "-m", "deploy.backends", "--folder", str(tmp_path), "--tls"]
    subprocess.run(made, cwd=ROOT, check=True, capture_output=True)
    created: dict[str, set[str]] = {}
    for name, rest in re.findall(r"create secret generic (\S+)((?: \\\n|[^\n])*)", instructions):
        files = re.findall(r"--from-file=([\w-]+)(?:=(\S+))?", rest)
        assert all((tmp_path / (path or key)).stat().st_mode & 0o777 == 0o600 for key, path in files)
        created[name] = {key for key, _ in files}
    for name, container in containers().items():
        wanted = {e["value"].removeprefix("/secrets/") for e in container["env"] if e["value"].startswith("/secrets/")}
        assert wanted
        assert wanted == created[f"axon-{name}"]
    [scaler] = [d for d in documents() if d["kind"] == "TriggerAuthentication"]
    assert {(ref["name"], ref["key"]) for ref in scaler["spec"]["secretTargetRef"]} == {("axon-keda", "management-url")}
    assert created["axon-keda"] == {"management-url"}
    steps = ["deploy.backends", "apply -f deploy/k8s/namespace.yaml", "create secret", "apply -k", "axon keys create"]
    assert sorted(steps, key=instructions.index) == steps
    assert (tmp_path / "axon-keys.redis-url").read_text().startswith("rediss://axon-keys:")
    assert "\n" not in (tmp_path / "axon-keda.management-url").read_text()


def test_the_scalers_user_may_look_at_queues_and_touch_none() -> None:
    definitions = json.loads((ROOT / "deploy" / "rabbitmq" / "definitions.json.template").read_text())
    [tags] = [user["tags"] for user in definitions["users"] if user["name"] == "axon-keda"]
    assert tags == ["monitoring"]
    [permissions] = [p for p in definitions["permissions"] if p["user"] == "axon-keda"]
    assert {permissions[kind] for kind in ("configure", "write", "read")} == {"^$"}


def test_images_are_built_from_what_the_dockerfile_copies_and_nothing_else() -> None:
    copied = {
        source.rstrip("/")
        for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
        for source in line.split()[:-1]
    }
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines.index("*") < min(lines.index(f"!{source}") for source in copied)
    assert {line[1:] for line in lines if line.startswith("!")} == copied
    assert all((ROOT / source).exists() for source in copied)


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

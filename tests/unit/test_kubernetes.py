"""docker/k8s: every manifest is one that its API accepts, and holds together with image, recipe and the other ones."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from homodistil import cli
from homodistil.arguments import parse
from homodistil.config import RunConfig
from tests.manifests import K8S, LAUNCHERS, ROOT, SIZES, Object, faults, pods, render, with_launcher

FOLDERS = ["base", "shell", "data", "cache"]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Object]]:
    """Every folder, and every overlay with every launcher."""
    found = {name: render(K8S / name) for name in FOLDERS}
    for launcher in LAUNCHERS:
        tree = with_launcher(tmp_path_factory.mktemp("k8s") / launcher, launcher)
        found |= {f"{size}/{launcher}": render(tree / "overlays" / size) for size in SIZES}
    return found


@pytest.fixture(params=[*FOLDERS, *(f"{size}/{launcher}" for size in SIZES for launcher in LAUNCHERS)])
def objects(request: pytest.FixtureRequest, rendered: dict[str, list[Object]]) -> list[Object]:
    """Those of one folder or overlay."""
    return rendered[request.param]


def of_kind(objects: list[Object], kind: str) -> Object:
    return next(manifest for manifest in objects if manifest["kind"] == kind)


def test_every_object_is_as_its_schema_says(objects: list[Object]) -> None:
    assert objects
    for manifest in objects:
        assert not faults(manifest), manifest["kind"]


@pytest.mark.parametrize("path", sorted(K8S.rglob("kustomization.yaml")), ids=lambda path: path.parent.name)
def test_every_kustomization_is_as_its_schema_says(path: Path) -> None:
    assert not faults(yaml.safe_load(path.read_text(encoding="utf-8")))


MISSPELT = [
    ("base", "Deployment", "spec.template.spec.containers.0.readinesProbe"),
    ("base", "Service", "spec.selectors"),
    ("base", "NetworkPolicy", "spec.egres"),
    ("base", "PersistentVolumeClaim", "spec.accessMode"),
    ("base", "ConfigMap", "dta"),
    ("data", "Job", "spec.backofLimit"),
    ("gpu-8/jobset", "JobSet", "spec.failurePolicy.maxRestart"),
    ("gpu-8/jobset", "JobSet", "spec.replicatedJobs.0.template.spec.template.spec.terminationGracePeriod"),
    ("gpu-8/trainjob", "TrainJob", "spec.trainer.numProcsPerNode"),
    ("gpu-8/trainjob", "TrainingRuntime", "spec.template.spec.failurePolicies"),
    ("gpu-8/mpijob", "MPIJob", "spec.slotPerWorker"),
    ("gpu-8/mpijob", "MPIJob", "spec.mpiReplicaSpecs.Worker.template.spec.nodeselector"),
]


@pytest.mark.parametrize(("name", "kind", "field"), MISSPELT, ids=lambda value: value.rsplit(".", 1)[-1])
def test_a_misspelt_field_is_refused(rendered: dict[str, list[Object]], name: str, kind: str, field: str) -> None:
    manifest = copy.deepcopy(of_kind(rendered[name], kind))
    *way, last = field.split(".")
    inside: Any = manifest
    for step in way:
        inside = inside[int(step) if isinstance(inside, list) else step]
    inside[last] = 1
    assert any(repr(last) in fault for fault in faults(manifest))


def test_a_misspelt_field_of_a_kustomization_is_refused() -> None:
    kustomization = yaml.safe_load((K8S / "base/kustomization.yaml").read_text(encoding="utf-8"))
    assert faults({**kustomization, "resource": []})


def test_pods_are_as_the_restricted_standard_asks(objects: list[Object]) -> None:
    for manifest in objects:
        for pod in pods(manifest):
            context = pod["securityContext"]
            assert context["runAsNonRoot"] and context["runAsUser"] == 1000
            assert context["seccompProfile"] == {"type": "RuntimeDefault"}
            assert pod["automountServiceAccountToken"] is False
            for container in pod["containers"]:
                own = container["securityContext"]
                assert own["readOnlyRootFilesystem"] and not own["allowPrivilegeEscalation"]
                assert own["capabilities"] == {"drop": ["ALL"]}


def test_everything_is_in_one_namespace_and_labelled_for_its_network_policy(objects: list[Object]) -> None:
    label = ("app.kubernetes.io/part-of", "homodistil")
    for manifest in objects:
        assert manifest["kind"] == "Namespace" or manifest["metadata"]["namespace"] == "homodistil"
        for template in templates(manifest):
            assert label in template["metadata"]["labels"].items(), manifest["kind"]


def templates(value: Any) -> list[Object]:
    """What holds a pod's spec."""
    if isinstance(value, dict):
        own = [value] if "containers" in value.get("spec", {}) else []
        return own or [found for part in value.values() for found in templates(part)]
    return [found for part in value for found in templates(part)] if isinstance(value, list) else []


def test_what_pods_mount_and_read_exists(rendered: dict[str, list[Object]], objects: list[Object]) -> None:
    known = {(found["kind"], found["metadata"]["name"]) for found in [*rendered["base"], *objects]}
    for manifest in objects:
        for pod in pods(manifest):
            volumes = {volume["name"]: volume for volume in pod["volumes"]}
            for container in pod["containers"]:
                assert {mount["name"] for mount in container["volumeMounts"]} <= volumes.keys()
                for source in container.get("envFrom", []):
                    assert ("ConfigMap", source["configMapRef"]["name"]) in known
            for volume in volumes.values():
                claim, config = volume.get("persistentVolumeClaim"), volume.get("configMap")
                assert not claim or ("PersistentVolumeClaim", claim["claimName"]) in known
                assert not config or config["optional"] or ("ConfigMap", config["name"]) in known


def test_training_pods_have_shared_memory_and_time_to_write_a_checkpoint(
    rendered: dict[str, list[Object]], objects: list[Object]
) -> None:
    environment = of_kind(rendered["base"], "ConfigMap")["data"]
    for manifest in objects:
        if manifest["kind"] in {"JobSet", "TrainingRuntime", "MPIJob"}:
            for pod in pods(manifest):
                assert {"name": "shm", "mountPath": "/dev/shm"} in pod["containers"][0]["volumeMounts"]
                assert pod["terminationGracePeriodSeconds"] > int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) > 120


@pytest.mark.parametrize("size", SIZES)
def test_every_launcher_asks_for_the_overlays_gpus(rendered: dict[str, list[Object]], size: str) -> None:
    jobs = of_kind(rendered[f"{size}/jobset"], "JobSet")["spec"]["replicatedJobs"][0]["template"]["spec"]
    container = jobs["template"]["spec"]["containers"][0]
    environment = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert jobs["completions"] == jobs["parallelism"] == int(environment["PET_NNODES"])
    assert jobs["completions"] * gpus(container["resources"]) == SIZES[size]
    assert environment["PET_NPROC_PER_NODE"] == "gpu"

    trainer = of_kind(rendered[f"{size}/trainjob"], "TrainJob")["spec"]["trainer"]
    assert trainer["numNodes"] * trainer["numProcPerNode"] == SIZES[size]
    assert trainer["numProcPerNode"] == gpus(trainer["resourcesPerNode"])

    mpi = of_kind(rendered[f"{size}/mpijob"], "MPIJob")["spec"]
    worker = mpi["mpiReplicaSpecs"]["Worker"]
    assert worker["replicas"] * mpi["slotsPerWorker"] == SIZES[size]
    assert mpi["slotsPerWorker"] == gpus(worker["template"]["spec"]["containers"][0]["resources"])


def gpus(resources: Object) -> int:
    return int(resources["limits"]["nvidia.com/gpu"])


def test_the_first_pod_is_where_the_others_look_for_it(rendered: dict[str, list[Object]]) -> None:
    jobset = of_kind(rendered["gpu-64/jobset"], "JobSet")
    name, job = jobset["metadata"]["name"], jobset["spec"]["replicatedJobs"][0]
    container = next(pods(jobset))["containers"][0]
    environment = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert environment["PET_MASTER_ADDR"] == f"{name}-{job['name']}-0-0.{name}"
    assert int(environment["PET_MASTER_PORT"]) == container["ports"][0]["containerPort"]


@pytest.mark.parametrize("kind", ["JobSet", "TrainingRuntime"])
def test_a_preempted_pod_starts_all_pods_again(rendered: dict[str, list[Object]], kind: str) -> None:
    manifest = of_kind(rendered[f"gpu-8/{'jobset' if kind == 'JobSet' else 'trainjob'}"], kind)
    spec = manifest["spec"] if kind == "JobSet" else manifest["spec"]["template"]["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"
    rules = job["podFailurePolicy"]["rules"]
    assert [rule["action"] for rule in rules] == ["FailJob"]
    assert rules[0]["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert spec["failurePolicy"]["maxRestarts"] >= 100, "a preemption counts where another pod's end is seen first"
    assert spec["failurePolicy"]["rules"][0]["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert spec["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]


def test_the_overlay_of_the_documents_starts_its_script_on_four_nodes(tmp_path: Path) -> None:
    text = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    (kustomization,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    own = with_launcher(tmp_path / "k8s", "jobset") / "overlays/own"
    own.mkdir()
    (own / "kustomization.yaml").write_text(kustomization)
    (own / "recipe.yaml").write_text("extends: ted_mlm")
    assert not faults(yaml.safe_load(kustomization))
    objects = render(own)
    assert not [fault for manifest in objects for fault in faults(manifest)]
    assert of_kind(objects, "ConfigMap")["data"]["recipe.yaml"] == "extends: ted_mlm"
    jobs = of_kind(objects, "JobSet")["spec"]["replicatedJobs"][0]["template"]["spec"]
    container = jobs["template"]["spec"]["containers"][0]
    nodes = next(variable["value"] for variable in container["env"] if variable["name"] == "PET_NNODES")
    assert jobs["completions"] == jobs["parallelism"] == int(nodes) == 4
    assert jobs["completions"] * gpus(container["resources"]) == 32
    assert container["command"] == ["torchrun", "launchers/learn_filters.py"]
    given = parse(cli.LearnFilters, "program", container["args"])
    assert (given["of"], given["recipe"]) == ("teacher", "recipe/recipe.yaml")


@pytest.mark.parametrize("size", SIZES)
def test_an_overlays_recipe_is_one_that_its_ranks_can_share(size: str) -> None:
    data = RunConfig.load(str(K8S / "overlays" / size / "recipe.yaml"), {}).data
    assert data.lanes % SIZES[size] == 0


def test_the_cache_jobs_recipe_names_a_cache_and_its_ranks_can_share_it(rendered: dict[str, list[Object]]) -> None:
    run = RunConfig.load(str(K8S / "cache/recipe.yaml"), {})
    ranks = gpus(next(pods(of_kind(rendered["cache"], "Job")))["containers"][0]["resources"])
    assert run.cache.path and run.data.lanes % ranks == 0

"""docker/k8s as Kubernetes would get it: rendered by kustomize, and checked against schemas without a cluster.

Core kinds have Kubernetes' own schemas, in the strict form in which a misspelt field is an error; the custom kinds'
are in docker/schemas and refer to them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from referencing import Registry, Resource

ROOT = Path(__file__).parents[1]
K8S = ROOT / "docker" / "k8s"
SCHEMAS = ROOT / "docker" / "schemas"
SIZES = {"gpu-1": 1, "gpu-8": 8, "gpu-64": 64}
"""GPUs of each overlay."""
LAUNCHERS = {"jobset": "JobSet", "trainjob": "TrainJob", "mpijob": "MPIJob"}
"""Folders that an overlay can build on, and the kind that trains."""
KUBERNETES = "v1.37.0"
CUSTOM_GROUPS = ("jobset.x-k8s.io", "trainer.kubeflow.org", "kubeflow.org")

Object = dict[str, Any]


def render(folder: Path) -> list[Object]:
    """The objects of a kustomization. Skips where there is neither kustomize nor kubectl."""
    programs = {"kustomize": ["kustomize", "build"], "kubectl": ["kubectl", "kustomize"]}
    command = next((words for name, words in programs.items() if shutil.which(name)), None)
    if command is None:
        pytest.skip("neither kustomize nor kubectl is installed")
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def with_launcher(tree: Path, launcher: str) -> Path:
    """A copy of docker/k8s at `tree` whose overlays build on that launcher, as their comment says."""
    shutil.copytree(K8S, tree)
    for path in tree.glob("overlays/*/kustomization.yaml"):
        path.write_text(path.read_text().replace("../../jobset]", f"../../{launcher}]"))
    return tree


@cache
def validator(api_version: str, kind: str) -> jsonschema.Draft202012Validator:
    """Of one kind; raises `FileNotFoundError` for one that nobody has a schema of."""
    core = files("kubernetes_validate").joinpath(f"kubernetes-json-schema/{KUBERNETES}-local-strict")
    group, _, version = api_version.rpartition("/")
    if group in CUSTOM_GROUPS or group == "kustomize.config.k8s.io":
        name = "kustomization" if group == "kustomize.config.k8s.io" else kind.lower()
        schema = json.loads((SCHEMAS / f"{name}.json").read_text(encoding="utf-8"))
    else:
        prefix = f"{group.split('.')[0]}-" if group else ""
        schema = json.loads(core.joinpath(f"{kind.lower()}-{prefix}{version}.json").read_text(encoding="utf-8"))
    definitions = json.loads(core.joinpath("_definitions.json").read_text(encoding="utf-8"))
    jobset = json.loads((SCHEMAS / "jobset.json").read_text(encoding="utf-8"))
    registry: Registry[Any] = Registry().with_resources(
        [
            ("/api/_definitions.json", Resource.from_contents(definitions)),
            ("jobset.json", Resource.from_contents(jobset)),
        ]
    )
    return jsonschema.Draft202012Validator(schema, registry=registry)


def faults(manifest: Object) -> list[str]:
    """Where it is not as its schema says; empty if it is."""
    found = validator(manifest["apiVersion"], manifest["kind"]).iter_errors(manifest)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:300]}" for error in found]


def pods(value: Any) -> Iterator[Object]:
    """Every pod's spec in an object, wherever its kind keeps it."""
    if isinstance(value, dict):
        if "containers" in value:
            yield value
        else:
            for part in value.values():
                yield from pods(part)
    elif isinstance(value, list):
        for part in value:
            yield from pods(part)

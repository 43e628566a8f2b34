"""docker/: an image that can be built, runs as nobody in particular, and whose health check tells something.

What needs an engine is in `test_a_recipe_runs_to_its_end_in_the_image`, for where docker/build_rootless.sh ran.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement

from homodistil.claim import LOCK
from tests.manifests import K8S, ROOT, SCHEMAS

DOCKER = ROOT / "docker"
IMAGE = "localhost/homodistil:cpu"
BUILD_TOOLS = {
    "gcc",
    "g++",
    "clang",
    "make",
    "cmake",
    "ninja-build",
    "build-essential",
    "python3-dev",
    "python3-pip",
    "git",
}


def steps() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, continued lines joined."""
    text = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def stage(name: str) -> list[tuple[str, str]]:
    """Instructions of one stage."""
    found: dict[str, list[tuple[str, str]]] = {}
    for instruction, argument in steps():
        if instruction == "FROM":
            found[argument.split()[-1]] = []
        elif found:
            next(reversed(found.values())).append((instruction, argument))
    return found[name]


def environment() -> dict[str, str]:
    """What the image sets."""
    settings = " ".join(argument for instruction, argument in stage("runtime") if instruction == "ENV")
    return dict(re.findall(r"(\w+)=(\S+)", settings))


def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8")))


def test_what_is_copied_is_there_and_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    copies = [argument.split() for instruction, argument in steps() if instruction == "COPY"]
    sources = [word for words in copies for word in words[:-1] if not words[0].startswith("--from")]
    assert "homodistil" in sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert {f"!{source}", f"!{Path(source).parent}"} & set(ignored), f"{source} does not reach the build"


def test_bases_and_packages_are_pinned() -> None:
    bases = [argument for instruction, argument in steps() if instruction == "ARG" and argument.startswith("BASE=")]
    assert re.search(r":\S*\d{8}\S*$", bases[0]), "the tag of a day, which is not moved"
    lines = (DOCKER / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().split("==") for line in lines if not line.startswith("#"))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    needed = re.findall(r'^ +"([^"]+)"', project.split("\ndependencies = [")[1].split("\n]")[0], flags=re.MULTILINE)
    assert len(needed) > 10
    for wanted in map(Requirement, needed):
        assert pins[wanted.name.lower()] in wanted.specifier, wanted


def test_what_runs_has_no_build_tools_and_is_not_root() -> None:
    runs = [argument for name in ("python", "runtime") for kind, argument in stage(name) if kind == "RUN"]
    installed = {word for run in runs for word in run.split()}
    assert "openmpi-bin" in installed and not installed & BUILD_TOOLS
    assert [argument for kind, argument in stage("runtime") if kind == "USER"][-1] == "1000:1000"


def test_the_launcher_is_process_1() -> None:
    entry = [argument for kind, argument in stage("runtime") if kind == "ENTRYPOINT"]
    assert json.loads(entry[0]) == ["torchrun"]


def test_home_and_every_cache_lie_where_all_manifests_mount_something_writable() -> None:
    written = {name: value for name, value in environment().items() if re.search(r"HOME|_DIR$|CONFIGDIR", name)}
    assert {"HOME", "HF_HOME", "TRITON_CACHE_DIR", "MPLCONFIGDIR"} <= written.keys()
    common = yaml.safe_load((K8S / "common/pod.yaml").read_text(encoding="utf-8"))["template"]["spec"]["containers"][0]
    mounts = {mount["mountPath"] for mount in common["volumeMounts"] if not mount.get("readOnly")}
    assert mounts == {"/opt/homodistil/data", "/opt/homodistil/runs", "/cache", "/tmp", "/dev/shm"}
    assert all(value.split("/")[1] == "cache" for value in written.values())
    for service in compose()["services"].values():
        targets = {volume.split(":")[1] for volume in service["volumes"]}
        assert targets == mounts - {"/tmp", "/dev/shm"} and service["tmpfs"][0].startswith("/tmp")
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["user"] == "1000:1000"


def test_the_compose_file_is_as_its_schema_says() -> None:
    schema = json.loads((SCHEMAS / "compose.json").read_text(encoding="utf-8"))
    jsonschema.validate(compose(), schema)
    misspelt = compose()
    misspelt["services"]["train"]["readonly"] = True
    with pytest.raises(jsonschema.ValidationError, match="readonly"):
        jsonschema.validate(misspelt, schema)


def test_a_stopped_container_has_time_to_write_a_checkpoint() -> None:
    for name in ("train", "train-cpu"):
        grace = int(compose()["services"][name]["stop_grace_period"].removesuffix("s"))
        assert grace > int(environment()["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])


@pytest.fixture
def run_here(tmp_path: Path) -> Path:
    """A run whose lock process 7 of `tmp_path`/proc holds, as homodistil/claim.py does."""
    run, descriptors = tmp_path / "runs" / "small-1", tmp_path / "proc" / "7" / "fd"
    (run / "checkpoints").mkdir(parents=True)
    descriptors.mkdir(parents=True)
    (descriptors / "3").symlink_to(run / "checkpoints" / LOCK)
    (run / "run.yaml").write_text("health: {hang_timeout_seconds: 1800}")
    (run / "metrics.jsonl").write_text("{}")
    return run


def last_written(run: Path, seconds_ago: float) -> None:
    for path in (run / "run.yaml", run / "metrics.jsonl"):
        os.utime(path, (time.time() - seconds_ago,) * 2)


def test_a_run_that_logs_is_healthy_and_one_that_logs_nothing_for_too_long_is_not(
    run_here: Path, tmp_path: Path
) -> None:
    check = runpy.run_path(str(DOCKER / "healthcheck.py"))["main"]
    last_written(run_here, seconds_ago=1700)
    check(tmp_path / "proc")
    last_written(run_here, seconds_ago=1900)
    with pytest.raises(SystemExit, match=r"small-1/metrics.jsonl: nothing logged for 19\d\d s"):
        check(tmp_path / "proc")


def test_a_container_that_holds_no_run_is_healthy(run_here: Path, tmp_path: Path) -> None:
    last_written(run_here, seconds_ago=1900)
    (tmp_path / "proc/7/fd/3").unlink()
    runpy.run_path(str(DOCKER / "healthcheck.py"))["main"](tmp_path / "proc")


@pytest.mark.slow
def test_a_recipe_runs_to_its_end_in_the_image(tmp_path: Path) -> None:
    podman = shutil.which("podman")
    if podman is None or subprocess.run([podman, "image", "exists", IMAGE]).returncode:
        pytest.skip(f"podman has no image {IMAGE}: run docker/build_rootless.sh first")
    flags = ["--standalone", "--nproc-per-node", "2", "launchers/pretrain.py", "--recipe", "smoke"]
    done = subprocess.run(
        [str(DOCKER / "try_image.sh"), IMAGE, *flags],
        env={**os.environ, "OUTPUT": str(tmp_path), "NAME": f"homodistil-{os.getpid()}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    summary = json.loads((tmp_path / "runs/smoke/summary.json").read_text())
    assert (summary["world_size"], summary["exit_status"]) == (2, 0)
    assert (tmp_path / "runs/smoke").stat().st_uid == 1000

"""What documents, manifests and image name is there: paths, flags, keys of recipes, environment variables, ports.

Commands of README have a test of their own, which parses them; here every word that looks like a name is looked up.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel
from torch.distributed.run import get_args_parser

from homodistil import cli
from homodistil.arguments import parse
from homodistil.config import RunConfig
from homodistil.data.commands import TrainTokenizer, VerifyShards
from tests.manifests import K8S, ROOT
from tests.unit.test_docker import compose, environment, stage, steps
from tests.unit.test_readme import SETTINGS as READMES

SETTINGS: dict[str, type[BaseModel]] = {
    **READMES,
    "export.py": cli.Export,
    "verify_shards.py": VerifyShards,
    "train_tokenizer.py": TrainTokenizer,
}
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MANIFESTS = sorted({*K8S.rglob("*.yaml"), ROOT / "docker/compose.yaml"})
TEXTS = [*DOCUMENTS, *MANIFESTS, *(path for path in sorted((ROOT / "docker").rglob("*")) if path.is_file())]
OUR_FOLDERS = "benchmarks|data_prep|docker|docs|ds_configs|homodistil|launchers|tests"

PLACEHOLDERS = {"ds_configs/zeroS.json"}
"""A document's S is for a stage."""
OUTSIDE_FLAGS = {
    "deepspeed": {"--num_accelerators", "--hostfile", "--num_nodes", "--master_addr"},
    "sbatch, srun, scontrol": {"--signal", "--requeue", "--mpi", "--nodes"},
    "docker, apt-get": {"--profile", "--build-arg", "--entrypoint", "--rm", "--no-install-recommends"},
    "kubectl": {"--for", "--timeout", "--max-log-requests", "--cascade"},
    "mpirun": {"--bind-to", "--host", "--prtemca", "--mca"},
    "tensorboard": {"--logdir", "--bind_all", "--port"},
    "all": {"--help"},
}
"""Flags of programs that are not ours, where a document or a manifest names them."""
OUTSIDE_VARIABLES = {
    "torchrun": ["PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"],
    "torch": ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"],
    "NCCL, gloo": ["NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"],
    "Hugging Face": ["HF_HOME", "HF_HUB_OFFLINE"],
    "matplotlib": ["MPLCONFIGDIR"],
    "Python": ["PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE"],
    "the system": ["PATH", "HOME", "XDG_CACHE_HOME", "LD_LIBRARY_PATH"],
    "NVIDIA's container toolkit": ["NVIDIA_DRIVER_CAPABILITIES"],
}
"""Environment variables that somebody else reads, by who does."""
PORTS = {"6006": "TensorBoard", "29500": "rendezvous", "2222": "sshd", "53": "names", "5353": "names"}


def texts(paths: list[Path]) -> list[object]:
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in paths]


def missing_paths(text: str) -> set[str]:
    named = set(re.findall(rf"(?<![\w./-])(?:{OUR_FOLDERS})/[\w./*-]*\w", text))
    return {name for name in named - PLACEHOLDERS if not any(ROOT.glob(name))}


@pytest.mark.parametrize("path", texts(TEXTS))
def test_every_path_of_ours_that_is_named_exists(path: Path) -> None:
    assert not missing_paths(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", texts(DOCUMENTS))
def test_every_link_of_a_document_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (path.parent / target).exists(), target


@cache
def known_flags() -> set[str]:
    """Ours, torchrun's, benchmarks', and those listed above."""
    models = {*SETTINGS.values(), cli.PlanRun}
    ours = {f"--{key}" for model in models for key in keys(model)} | {"--recipe"}
    scripts = [*(ROOT / "benchmarks").glob("*.py"), ROOT / "tests/faults/campaign.py"]
    added = {flag for path in scripts for flag in re.findall(r"add_argument\(\s*\"(--[\w-]+)", path.read_text())}
    torchrun = set(get_args_parser()._option_string_actions)
    return ours | added | torchrun | {flag for flags in OUTSIDE_FLAGS.values() for flag in flags}


def keys(model: type[BaseModel]) -> Iterator[str]:
    """Dotted names of all fields."""
    for name, field in model.model_fields.items():
        yield name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from (f"{name}.{key}" for key in keys(field.annotation))


def unknown_flags(text: str) -> set[str]:
    named = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w.-]*\w", text))
    return named - known_flags()


@pytest.mark.parametrize(
    "path", texts([*DOCUMENTS, ROOT / "docker/compose.yaml", ROOT / "docker/k8s/mpijob/mpijob.yaml"])
)
def test_every_flag_that_is_named_is_one(path: Path) -> None:
    assert not unknown_flags(path.read_text(encoding="utf-8"))


def unknown_keys(text: str) -> set[str]:
    sections = "|".join(RunConfig.model_fields)
    return set(re.findall(rf"`((?:{sections})\.(?!py|yaml)[a-z_.]+)`", text)) - set(keys(RunConfig))


@pytest.mark.parametrize("path", texts(DOCUMENTS))
def test_every_key_of_a_recipe_that_a_document_names_is_one(path: Path) -> None:
    assert not unknown_keys(path.read_text(encoding="utf-8"))


def manifest_commands() -> Iterator[tuple[str, list[str]]]:
    """What manifests, compose file and image start, as words, with where."""
    for path in K8S.rglob("*.yaml"):
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            yield from ((str(path.relative_to(ROOT)), words) for words in started(document))
    for name, service in compose()["services"].items():
        words = service["command"]
        yield f"compose: {name}", shlex.split(words.replace("${ARGS:-}", "")) if isinstance(words, str) else words
    command = next(argument for kind, argument in stage("runtime") if kind == "CMD")
    yield "Dockerfile", yaml.safe_load(command)


def started(value: object) -> Iterator[list[str]]:
    if isinstance(value, dict):
        if isinstance(value.get("command"), list):
            yield [*value["command"], *value.get("args", [])]
        for part in value.values():
            yield from started(part)
    elif isinstance(value, list):
        for part in value:
            yield from started(part)


OURS = [(where, words) for where, words in manifest_commands() if any(word.endswith(".py") for word in words)]


@pytest.mark.parametrize(("where", "words"), OURS, ids=[where for where, _ in OURS])
def test_what_a_manifest_starts_can_be_started(where: str, words: list[str]) -> None:
    at, script = next((i, word) for i, word in enumerate(words) if word.endswith(".py"))
    assert (ROOT / script).is_file()
    flags = words[at + 1 :]
    given = parse(SETTINGS[Path(script).name], "program", flags)
    assert (ROOT / given.get("ds_config", "ds_configs/zero2.json")).is_file()
    launcher = get_args_parser()._option_string_actions
    if "mpirun" not in words[0]:
        assert all(word in launcher for word in words[:at] if word.startswith("--"))


def test_the_manifests_start_every_script_that_they_are_for() -> None:
    scripts = {word for _, words in OURS for word in words if word.endswith(".py")}
    assert {"launchers/pretrain.py", "launchers/cache_teacher.py", "data_prep/build_shards.py"} <= scripts


def unread_variables(names: set[str]) -> set[str]:
    """Those that neither our sources nor anybody listed above reads."""
    outside = {name for names in OUTSIDE_VARIABLES.values() for name in names}
    arguments = {argument.split("=")[0] for kind, argument in steps() if kind == "ARG"}
    scripts = [*(ROOT / "homodistil").rglob("*.py"), *(ROOT / "launchers").glob("*"), *(ROOT / "docker").glob("*.sh")]
    ours = "\n".join(path.read_text(encoding="utf-8") for path in scripts if path.is_file())
    return {name for name in names - outside - arguments if not re.search(rf"\b{name}\b", ours)}


def test_every_environment_variable_of_a_manifest_is_read_by_somebody() -> None:
    named = set(environment())
    for path in MANIFESTS:
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            named |= set(variables(document))
    assert {"HF_HUB_OFFLINE", "PET_NNODES"} <= named
    assert not unread_variables(named)


@pytest.mark.parametrize("path", texts(DOCUMENTS))
def test_every_environment_variable_of_a_document_is_read_by_somebody(path: Path) -> None:
    named = set(re.findall(r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b", path.read_text(encoding="utf-8")))
    assert not unread_variables(named)


def variables(value: object) -> Iterator[str]:
    """Names in `env` lists, in the ConfigMap of the environment, and after mpirun's -x."""
    if isinstance(value, dict):
        if value.get("kind") == "ConfigMap":
            yield from value["data"]
        for key, part in value.items():
            if key == "env":
                yield from (variable["name"] for variable in part)
            elif key == "environment":
                yield from part
            elif key == "command" and "-x" in part:
                yield from (word for before, word in pairwise(part) if before == "-x")
            else:
                yield from variables(part)
    elif isinstance(value, list):
        for part in value:
            yield from variables(part)


def unknown_ports(text: str) -> set[str]:
    found = re.findall(r"(?:[pP]ort:? |containerPort: |EXPOSE |localhost:|127\.0\.0\.1:)\"?(\d{2,5})\b", text)
    return set(found) - PORTS.keys()


@pytest.mark.parametrize("path", texts(TEXTS))
def test_every_port_is_one_that_something_listens_on(path: Path) -> None:
    assert not unknown_ports(path.read_text(encoding="utf-8"))


def test_a_wrong_name_is_noticed() -> None:
    assert missing_paths("run `launchers/pretrian.py` or docs/operations.md.") == {"launchers/pretrian.py"}
    assert unknown_flags("torchrun --nproc-per-node 8 --recipe x --data.shard y") == {"--data.shard"}
    assert unknown_keys("`data.lanes` and `data.lane`") == {"data.lane"}
    assert unread_variables({"NCCL_DEBUG", "MASTER_ADDR", "HOMODISTIL_LEVEL"}) == {"HOMODISTIL_LEVEL"}
    assert unknown_ports("http://localhost:6006, containerPort: 29501") == {"29501"}


def test_the_ports_are_those_of_the_programs_behind_them() -> None:
    exposed = next(argument for kind, argument in stage("runtime") if kind == "EXPOSE").split()
    assert set(exposed) == PORTS.keys() - {"53", "5353"}
    assert "\nPort 2222\n" in (ROOT / "docker/ssh/sshd_config").read_text(encoding="utf-8")
    assert compose()["services"]["tensorboard"]["entrypoint"][-1] == "6006"

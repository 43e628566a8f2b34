"""launchers/slurm.sbatch and hostfile.example: what they say is understood, and the script starts ranks that train."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from deepspeed.launcher.runner import fetch_hostfile

from homodistil.errors import Preempted
from tests import runs

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launchers" / "slurm.sbatch"
SBATCH = {
    "job-name", "nodes", "gpus-per-node", "ntasks-per-node", "cpus-per-task", "time", "signal", "requeue", "open-mode",
    "output",
}  # fmt: skip
"""Those options of sbatch that the script may use, spelled as `man sbatch` does."""
SRUN = {"kill-on-bad-exit", "wait", "cpus-per-task"}
STARTS_TWO_RANKS = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for rank in 0 1; do SLURM_STEP_NUM_TASKS=2 SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & ranks+=($!); done
for rank in "${ranks[@]}"; do wait "$rank" || code=$?; done
exit "${code:-0}"
"""
SCONTROL = """#!/bin/bash
[[ "$1 $2" == "show hostnames" ]] && echo localhost && exit
echo "$@" >> scontrol.said
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "launchers").symlink_to(SCRIPT.parent)
    return tmp_path


def submitted(folder: Path, srun: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The script as Slurm runs it, from `folder`, with an `srun` and a `scontrol` of our own."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for name, text in {"srun": srun, "scontrol": SCONTROL}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    ours = (str(programs), str(Path(sys.executable).parent), os.environ["PATH"])
    slurm = {"SUBMIT_DIR": str(folder), "JOB_ID": "4711", "JOB_NODELIST": "localhost", "NTASKS": "2"}
    environment = {**os.environ, "PATH": os.pathsep.join(ours), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {f"SLURM_{name}": value for name, value in slurm.items()} | variables
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def test_the_script_is_bash_and_its_options_are_slurms() -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0
    text = SCRIPT.read_text()
    given = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, flags=re.MULTILINE))
    assert len(given) == len(re.findall("^#SBATCH", text, flags=re.MULTILINE)) and given.keys() <= SBATCH
    assert given["signal"] == "USR1@120" and "requeue" in given
    assert given["gpus-per-node"] == given["ntasks-per-node"]
    line = next(line for line in text.splitlines() if line.startswith("srun "))
    assert {word[2:].split("=")[0] for word in shlex.split(line) if word.startswith("--")} <= SRUN


def test_the_script_starts_ranks_that_find_each_other_and_finish(folder: Path) -> None:
    runs.prepare(folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(runs.configuration(folder, "slurm")))
    settings = ["--ds_config", "zero2.json", "--teacher_ds_config", "teacher.json"]
    done = submitted(folder, STARTS_TWO_RANKS, *settings, "--recipe", "recipe.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((folder / "runs/slurm/summary.json").read_text())
    assert (summary["exit_status"], summary["world_size"], summary["prunes"]) == (0, 2, 3)
    assert not (folder / "scontrol.said").exists()


@pytest.mark.parametrize(("code", "said"), [(Preempted.exit_code, "requeue 4711\n"), (1, ""), (76, "")])
def test_only_a_preempted_job_is_queued_again(folder: Path, code: int, said: str) -> None:
    assert submitted(folder, f"#!/bin/bash\nexit {code}").returncode == code
    heard = folder / "scontrol.said"
    assert (heard.read_text() if heard.exists() else "") == said


@pytest.mark.parametrize("name", ["cache_teacher.py", "finetune.py"])
def test_another_launcher_can_be_named(folder: Path, name: str) -> None:
    say = '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\necho "$@"'
    assert submitted(folder, say, "--recipe", "x").stdout == "python launchers/pretrain.py --recipe x\n"
    done = submitted(folder, say, "--recipe", "x", LAUNCHER=f"launchers/{name}")
    assert done.stdout == f"python launchers/{name} --recipe x\n"


def test_deepspeed_reads_the_example_of_a_hostfile() -> None:
    assert dict(fetch_hostfile(str(SCRIPT.with_name("hostfile.example")))) == {"node01": 8, "node02": 8}

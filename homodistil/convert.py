"""A checkpoint, turned into what others read: a Hugging Face directory, or a DeepSpeed checkpoint.

On one process, without engines. What a Hugging Face directory holds is export.py's.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from homodistil.config import RunConfig
from homodistil.data.shards import ShardIndex
from homodistil.data.tokenizer import open_tokenizer, tokenizer_hash
from homodistil.errors import CheckpointError
from homodistil.export import export_student
from homodistil.files import write_durably, write_text_durably
from homodistil.fragments import SavedState
from homodistil.manifest import Manifest
from homodistil.run_plan import draw_blueprint, tokenizer_directory
from homodistil.state import MASTER, Range
from homodistil.student import MODEL


def to_huggingface(
    checkpoint: Path,
    output: Path,
    teacher: str | None = None,
    shards: Path | None = None,
    student: str | None = None,
) -> Path:
    """The student of a checkpoint as a plain Hugging Face directory, as the run itself leaves one at its end.

    teacher, shards, student: where the run's lie now, if they were moved. Raises `CheckpointError` for a damaged
    checkpoint or another teacher or tokenizer, `ShapeError` where no stock config expresses the shape.
    """
    manifest = _whole(checkpoint)
    run = _run_of_a_model(checkpoint, manifest)
    run.teacher.path, run.data.shards = teacher or run.teacher.path, shards or run.data.shards
    run.student.path = student or run.student.path
    tokenizer, vocab_size = _tokenizer(run)
    blueprint = draw_blueprint(run, vocab_size)
    found = {"tokenizer": tokenizer_hash(tokenizer), "architecture": blueprint.architecture_sha256}
    for what, digest in found.items():
        if digest != manifest.identity[what]:
            raise CheckpointError(
                f"{checkpoint}: its run had another {what} than {run.teacher.path or 'student.config'} and "
                f"{run.data.shards} have now. Give --teacher, --student and --shards where the run's own lie."
            )
    weights = model_weights(manifest.saved_state(checkpoint))
    return export_student(weights, blueprint, manifest.student_shape, output, tokenizer)


def _tokenizer(run: RunConfig) -> tuple[Path, int]:
    """Where a run's tokenizer lies, and the vocabulary's size for a model that is made from nothing."""
    if not run.task.task.is_language_modeling:
        folder = tokenizer_directory(run)
        return folder, len(open_tokenizer(folder))
    index = ShardIndex.load(run.data.shards, check_files=False)
    return run.data.shards / index.tokenizer_name, index.vocab_size


def to_deepspeed(checkpoint: Path, output: Path) -> Path:
    """A DeepSpeed checkpoint of the model's fp32 weights in `output`, as `zero_to_fp32.py` reads them: one partition
    of ZeRO stage 2, with that script beside it. Raises `CheckpointError` for a damaged checkpoint."""
    manifest = _whole(checkpoint)
    _run_of_a_model(checkpoint, manifest)
    weights = model_weights(manifest.saved_state(checkpoint))
    folder = output / checkpoint.name
    folder.mkdir(parents=True, exist_ok=True)
    partition = torch.cat([weight.flatten() for weight in weights.values()])
    optimizer = {"zero_stage": 2, "partition_count": 1, "single_partition_of_fp32_groups": [partition]}
    model: dict[str, object] = {
        "module": {},
        "buffer_names": [],
        "param_shapes": [{name: weight.shape for name, weight in weights.items()}],
        "shared_params": {},
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "ds_version": version("deepspeed"),
    }
    _save(folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt", {"optimizer_state_dict": optimizer})
    _save(folder / "mp_rank_00_model_states.pt", model)
    write_text_durably(output / "latest", checkpoint.name)
    deepspeed = find_spec("deepspeed")
    if deepspeed and deepspeed.origin:
        shutil.copy(Path(deepspeed.origin).parent / "utils" / "zero_to_fp32.py", output)  # as DeepSpeed itself does
    return folder


def model_weights(state: SavedState) -> dict[str, Tensor]:
    """The model's fp32 masters, whole, by their Hugging Face names; a tied tensor once."""
    everything = {name: Range(0, shape.numel()) for name, shape in state.shapes.items() if _is_model(name)}
    pieces = state.moved(everything, torch.device("cpu"))
    return {name.removeprefix(f"{MODEL}."): piece.values[MASTER].view(piece.shape) for name, piece in pieces}


def _is_model(name: str) -> bool:
    return name.startswith(f"{MODEL}.")


def _run_of_a_model(checkpoint: Path, manifest: Manifest) -> RunConfig:
    run = RunConfig.model_validate(manifest.run)
    if run.filters.of is not None:
        raise CheckpointError(f"{checkpoint}: its run learned filters, which are no model. Let it finish to have them.")
    return run


def _whole(checkpoint: Path) -> Manifest:
    manifest = Manifest.read(checkpoint)
    if faults := manifest.faults(checkpoint):
        raise CheckpointError(f"{'; '.join(faults)}. Take another checkpoint.")
    return manifest


def _save(path: Path, values: Mapping[str, object]) -> None:
    write_durably(path, lambda partial: torch.save(values, partial))

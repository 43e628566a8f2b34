"""A student as a plain Hugging Face directory: stock `from_pretrained` loads it, and it was tried before it counts.

Owns the directory's contents and the check. How weights reach rank 0 is the engine's affair; which stock config
expresses a shape, the model family's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from homodistil.config import RunConfig
from homodistil.data.tokenizer import open_tokenizer
from homodistil.errors import ModelError
from homodistil.models.loading import AUTO_CLASSES, materialise, model_hash, skeleton
from homodistil.models.shape import StudentShape, Widths
from homodistil.student import Blueprint
from homodistil.tasks import Kind

PROVENANCE = "homodistil.json"

CARD = """---
library_name: transformers
pipeline_tag: {pipeline}
tags: [distillation, pruning, homodistil]
---
# {name}

A {noun} of {millions:.1f} M parameters: {layers} layers, {widths}.
{origin}

```python
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

Weights are fp32. Dropout is the original's, for fine-tuning. `{provenance}` holds the whole configuration of the
run, the teacher's hash, and which of its units each of these is.
"""

WORDS: dict[Kind, tuple[str, str]] = {
    "masked": ("fill-mask", "masked language model"),
    "causal": ("text-generation", "causal language model"),
    "classification": ("text-classification", "text classifier"),
    "regression": ("text-classification", "text regressor"),
    "span": ("question-answering", "question-answering model"),
}
"""The model hub's name of what a model of each kind is for, and ours of the model."""


def export_student(
    weights: Mapping[str, Tensor], blueprint: Blueprint, shape: StudentShape, directory: Path, tokenizer: Path
) -> Path:
    """Write `directory`: safetensors, config, tokenizer, model card, homodistil.json. On one rank.

    weights: every parameter once, by its Hugging Face name, fp32, of the student's shape; a tied tensor once. An
    export already in `directory` is replaced, once the new one has been loaded by stock transformers and found equal.
    tokenizer: whatever `open_tokenizer` reads. Raises `ShapeError` if no stock config expresses `shape`, `ModelError`
    if weights and shape do not belong together or `directory` holds something else.
    """
    refuse_to_replace_anything_else(directory)
    model = _stock_model(weights, blueprint, shape)
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    open_tokenizer(tokenizer).save_pretrained(partial)
    (partial / PROVENANCE).write_text(json.dumps(_provenance(blueprint.run, shape), indent=1) + "\n", encoding="utf-8")
    (partial / "README.md").write_text(_card(directory.name, model, blueprint, shape), encoding="utf-8")
    permissions = (partial / PROVENANCE).stat().st_mode  # safetensors lets only its owner read what it writes
    for file in partial.iterdir():
        file.chmod(permissions)
    verify_export(partial, model, blueprint.family.kind)
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)
    return directory


def verify_export(directory: Path, model: PreTrainedModel, kind: Kind = "masked") -> None:
    """Load `directory` with stock transformers and compare it with `model`, bit by bit. Raises `ModelError`."""
    loaded, report = AUTO_CLASSES[kind].from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    faults = [f"{fault.replace('_', ' ')}: {sorted(names)}" for fault, names in report.items() if names]
    expected, found = model.state_dict(), loaded.state_dict()
    faults += [f"{name} differs" for name in expected if not torch.equal(expected[name], found[name])]
    if faults:
        raise ModelError(
            f"{directory}: stock {type(loaded).__name__} does not load it as it was saved: {'; '.join(faults)}. "
            "The folder is kept to be looked at; is the installed transformers the one that trained it?"
        )


def _stock_model(weights: Mapping[str, Tensor], blueprint: Blueprint, shape: StudentShape) -> PreTrainedModel:
    """A plain model with these weights, which scales its attention scores by its own head width."""
    family = blueprint.family
    model = skeleton(family.stock_config(blueprint.student_config, shape.widths), kind=family.kind)
    materialise(model)
    factors = family.fold_attention_scale(shape)
    parameters = dict(model.named_parameters())
    if faults := sorted(_shapes(parameters) ^ _shapes(weights)):
        raise ModelError(f"export of {shape.widths}: given weights and a stock model differ in {faults}.")
    for name, parameter in parameters.items():
        parameter.data.copy_(weights[name] * factors.get(name, 1.0))
    return model


def _shapes(tensors: Mapping[str, Tensor]) -> set[tuple[str, tuple[int, ...]]]:
    return {(name, tuple(tensor.shape)) for name, tensor in tensors.items()}


def refuse_to_replace_anything_else(directory: Path) -> None:
    if directory.exists() and not (directory / PROVENANCE).is_file():
        raise ModelError(f"{directory}: exists, and is no earlier export: it has no {PROVENANCE}. Move it away.")


def _provenance(run: RunConfig, shape: StudentShape) -> dict[str, object]:
    models = {"teacher": run.teacher.path, "student": run.student.path}
    return {
        **{name: path and {"path": path, "sha256": model_hash(path)} for name, path in models.items()},
        "shape": shape.as_dict(),
        "run": run.model_dump(mode="json"),
    }


def _card(name: str, model: PreTrainedModel, blueprint: Blueprint, shape: StudentShape) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    pipeline, noun = WORDS[blueprint.family.kind]
    return CARD.format(
        name=name,
        pipeline=pipeline,
        noun=noun,
        auto=AUTO_CLASSES[blueprint.family.kind].__name__,
        millions=parameters / 1e6,
        layers=shape.layers,
        widths=shape.widths,
        origin=_origin(blueprint.run, shape.teacher),
        provenance=PROVENANCE,
    )


def _origin(run: RunConfig, teacher: Widths) -> str:
    trained = f"for {run.run.updates} updates of {run.data.global_batch} sequences, recipe `{run.recipe}`"
    if run.teacher.path is None:
        start = f" from `{Path(run.student.path).name}`" if run.student.path else ""
        return f"Trained{start} {trained}."
    teacher_name = Path(run.teacher.path).name
    if run.student.path is not None:
        return f"It started as `{Path(run.student.path).name}` and was distilled from `{teacher_name}`, {trained}."
    how = "pruned out of" if run.student.init == "teacher" else "distilled from"
    return f"It was {how} `{teacher_name}` ({teacher}), {trained}."

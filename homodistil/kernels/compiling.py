"""torch.compile for a student whose shape changes: a graph per shape, or an error; never eager in silence.

A shape has one graph in training and one in evaluation, each for batches with and without padding.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils.output_capturing import maybe_install_capturing_hooks


def compile_encoder(model: PreTrainedModel) -> None:
    """Compile the forward of a model without its head, in place; names of parameters stay.

    Every rung of a ladder is a new shape of the same code, and dynamo by default runs the ninth one uncompiled after
    a single log line. So each module counts its own recompilations, where torch can, and reaching a limit raises.
    """
    encoder: Any = model.base_model
    maybe_install_capturing_hooks(encoder)  # else its first forward does it, under a lock that no graph can hold
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    settings: dict[str, Any] = {"fullgraph": True, "dynamic": False}
    if "isolate_recompiles" in signature(torch.compile).parameters:
        settings["isolate_recompiles"] = True
    encoder.compile(**settings)

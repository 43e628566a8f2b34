"""torch.compile for a student whose shape changes: one graph per shape, or an error; never eager in silence."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import nn


def compile_encoder(encoder: nn.Module) -> None:
    """Compile a module's forward in place, its parameters' names unchanged.

    Every rung of a ladder is a new shape of the same code, and dynamo by default runs the ninth one uncompiled after
    a single log line. So each module counts its own recompilations, where torch can, and reaching a limit raises.
    """
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    settings: dict[str, Any] = {"fullgraph": True, "dynamic": False}
    if "isolate_recompiles" in signature(torch.compile).parameters:
        settings["isolate_recompiles"] = True
    encoder.compile(**settings)

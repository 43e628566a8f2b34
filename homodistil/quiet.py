"""Fewer words from the libraries beneath, so that ours are read. Call before DeepSpeed is imported."""

from __future__ import annotations

import os
import warnings

import torch
from transformers.utils import logging as transformers_logging


def hush() -> None:
    """No accelerator guesses, deprecation notes, loading bars or tables of libraries; their errors stay. What a model
    lacks, loading.py says."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()

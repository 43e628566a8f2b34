"""RunConfig and its sections: what a recipe (YAML) and the command line may say, typed and documented.

Precedence: command line, then recipe, then the defaults here. ZeRO, precision, clipping, buckets and the
optimizer's type belong to the DeepSpeed JSON instead (ds_config.py); reading recipes and wording errors is
recipe.py's.
"""

from homodistil.config.knowledge import CacheConfig, FiltersConfig, KnowledgeConfig, Share
from homodistil.config.models import StudentConfig, TaskConfig, TeacherConfig
from homodistil.config.objective import AttentionTerm, HiddenTerm, KlTerm, ObjectiveConfig, Stage, TaskTerm, Term
from homodistil.config.pruning import PruningConfig, TargetShape
from homodistil.config.run import RunConfig
from homodistil.config.section import Section
from homodistil.config.training import (
    CheckpointConfig,
    DataConfig,
    HealthConfig,
    OptimizerConfig,
    PerformanceConfig,
    RunSection,
    ValidationConfig,
)

__all__ = [
    "AttentionTerm",
    "CacheConfig",
    "CheckpointConfig",
    "DataConfig",
    "FiltersConfig",
    "HealthConfig",
    "HiddenTerm",
    "KlTerm",
    "KnowledgeConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PerformanceConfig",
    "PruningConfig",
    "RunConfig",
    "RunSection",
    "Section",
    "Share",
    "Stage",
    "StudentConfig",
    "TargetShape",
    "TaskConfig",
    "TaskTerm",
    "TeacherConfig",
    "Term",
    "ValidationConfig",
]

"""Stage I of TED: the run that learns a model's filters, made out of the run that will compare them.

So one recipe describes both stages, and what stage I learns fits what stage II asks for. The training itself is
train.py's, what is trained learner.py's.
"""

from __future__ import annotations

from typing import Literal

from homodistil import checks
from homodistil.config import KnowledgeConfig, ObjectiveConfig, RunConfig, TargetShape, TeacherConfig
from homodistil.ds_config import DeepSpeedConfig
from homodistil.engine import started_ranks
from homodistil.errors import ConfigError
from homodistil.opening import forget_ending, provide_data
from homodistil.preemption import Preemption
from homodistil.run_plan import draw_blueprint, plan_run
from homodistil.student import Blueprint
from homodistil.train import train

Of = Literal["teacher", "student"]


def learn_filters(run: RunConfig, of: Of, ds_config: DeepSpeedConfig, teacher_ds_config: DeepSpeedConfig) -> None:
    """What `launchers/learn_filters.py` does: learn the filters of a run's teacher, or of its student. Collective."""
    with started_ranks() as ranks:
        source = provide_data(run, ranks)
        first = ranks.together(lambda: stage_one(run, of, draw_blueprint(run, source.vocab_size)))
        plan = ranks.together(lambda: plan_run(first, source, ds_config, ranks.world_size))
        ranks.once(lambda: forget_ending(first))
        with Preemption() as preemption:
            train(plan, teacher_ds_config, ranks, preemption)


def stage_one(run: RunConfig, of: Of, blueprint: Blueprint) -> RunConfig:
    """The run that learns the filters which `run` will compare: on the same layers, to the same width. Raises
    `ConfigError` where the model that they are of is still to be made."""
    checks.check_layers(blueprint)
    path = run.teacher.path if of == "teacher" else run.student.path
    if path is None:
        raise ConfigError(_without_a_model(run, of))
    first = run.model_copy(deep=True)
    first.run.name = run.filter_run(of)
    first.filters.of = of
    compared = blueprint.compared.teacher if of == "teacher" else blueprint.compared.student
    first.filters.layers = run.filters.layers or list(compared)
    first.filters.teacher = run.teacher.path if of == "student" else None
    first.teacher, first.knowledge, first.pruning.target = TeacherConfig(), KnowledgeConfig(), TargetShape()
    first.objective = ObjectiveConfig()
    first.student.path, first.student.layers, first.student.filters, first.student.init = path, None, None, "teacher"
    first.optimizer.weight_decay = 0.0
    first.optimizer.learning_rate = run.filters.learning_rate or run.optimizer.learning_rate
    if run.filters.updates is not None:
        first.run.updates, first.task.epochs = run.filters.updates, None
    return first


def _without_a_model(run: RunConfig, of: Of) -> str:
    if of == "teacher":
        return f"--of teacher, but recipe {run.recipe} has no teacher.path. Set it to the model."
    return (
        f"--of student, but recipe {run.recipe} has no student.path: its student is made from the teacher when the run "
        "starts, and begins with the teacher's filters. To learn its own, train it first, and set student.path."
    )

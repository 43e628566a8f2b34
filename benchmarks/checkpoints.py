"""Time to write and to restore a checkpoint, as multiples of a plain sequential write of the same bytes.

torchrun --nproc-per-node 2 -m benchmarks.checkpoints --directory /where/checkpoints/would/go

Arms interleaved, medians; what is restored is compared with what was written first, bit by bit. Every arm ends with
its bytes on disk (fsync), so the storage decides the speed and not the page cache. Restoring does read from that cache.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from transformers import BertConfig

from homodistil.checkpoint import Checkpoints
from homodistil.config import RunConfig
from homodistil.ds_config import DeepSpeedConfig
from homodistil.engine import StudentEngine, started_ranks
from homodistil.files import sync
from homodistil.metrics import Progress
from homodistil.models import family_of
from homodistil.models.attention import attention_implementation
from homodistil.models.loading import new_model
from homodistil.pruning.coordinator import PruningCoordinator
from homodistil.pruning.ladder import Ladder
from homodistil.ranks import Ranks
from homodistil.resume import resume
from homodistil.state import Piece, StudentState
from homodistil.student import Blueprint

ZERO2 = Path(__file__).parents[1] / "ds_configs" / "zero2.json"
CHUNK = bytes(1 << 22)
IN_BACKGROUND = "held up by one in the background"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("runs"), help="storage to measure")
    parser.add_argument("--layers", type=int, default=6, help="layers of the BERT; 12 is BERT-base")
    parser.add_argument("--hidden", type=int, default=384, help="its hidden width; 768 is BERT-base")
    parser.add_argument("--repeats", type=int, default=5, help="times each arm is measured")
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    with started_ranks() as ranks:
        place = Path(ranks.broadcast(tempfile.mkdtemp(dir=options.directory) if ranks.is_first else ""))
        try:
            measure(place, options, ranks)
        finally:
            ranks.once(lambda: shutil.rmtree(place, ignore_errors=True))


def measure(place: Path, options: argparse.Namespace, ranks: Ranks) -> None:
    """Interleave the arms and print the table. Collective."""
    run = RunConfig.model_validate(
        {"run": {"directory": place, "updates": 10**6}, "checkpoint": {"background": False, "keep": 1}}
    )
    student = build(run, options, ranks)
    pruner = PruningCoordinator(run.pruning, Ladder(()), student.groups, ranks, seed=0)
    state = student.export()
    size = sum(part.nbytes for piece in state.pieces.values() for part in piece.values.values())
    seconds: dict[str, list[float]] = {}
    for repeat in range(options.repeats):
        with timed("plain write", seconds, ranks):
            write_plainly(place / f"plain-{ranks.rank}-{repeat}", size)
        (place / f"plain-{ranks.rank}-{repeat - 1}").unlink(missing_ok=True)  # as a checkpoint, beside the one before
        run.checkpoint.background = False
        checkpoints = Checkpoints(run, {}, ranks)
        with timed("checkpoint write", seconds, ranks):
            checkpoints.write(2 * repeat + 1, student, pruner, [], Progress())
            checkpoints.advance()  # waits: it is not written in the background
        run.checkpoint.background = True
        checkpoints.write(2 * repeat + 2, student, pruner, [], Progress())
        while (held := checkpoints.advance()) is None:
            time.sleep(0.01)  # a step would be taken here
        seconds.setdefault(IN_BACKGROUND, []).append(max(ranks.gather(held)))
        checkpoints.close()
        with timed("restore", seconds, ranks):
            pieces = restored(run, state, ranks)
        assert_equal(pieces, state)
    total = sum(ranks.gather(size))
    if ranks.is_first:
        show(seconds, total, student.parameters, ranks)
    student.close()


def build(run: RunConfig, options: argparse.Namespace, ranks: Ranks) -> StudentEngine:
    """A BERT of the sizes asked for, in a ZeRO-2 engine."""
    config = BertConfig(
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        intermediate_size=4 * options.hidden,
    )
    attention = attention_implementation("sdpa")
    blueprint = Blueprint(family_of(config), config, run, attention)
    model = new_model(config, attention)
    settings = DeepSpeedConfig.load(ZERO2).resolved(run, ranks.world_size)
    return StudentEngine.build(blueprint, settings, ranks, model=model, shape=blueprint.full_shape)


@contextmanager
def timed(arm: str, seconds: dict[str, list[float]], ranks: Ranks) -> Iterator[None]:
    """Seconds until all ranks are done. Collective."""
    ranks.barrier()
    started = time.perf_counter()
    yield
    ranks.barrier()
    seconds.setdefault(arm, []).append(time.perf_counter() - started)


def write_plainly(path: Path, size: int) -> None:
    with path.open("wb") as file:
        for start in range(0, size, len(CHUNK)):
            file.write(CHUNK[: min(len(CHUNK), size - start)])
    sync(path)


def restored(run: RunConfig, held: StudentState, ranks: Ranks) -> dict[str, Piece]:
    """Find the newest checkpoint, verify it and read this rank's share. Collective."""
    found = resume(run, {}, ranks)
    assert found is not None and found.student is not None
    return dict(found.student.moved(held.layout, torch.device("cpu")))


def assert_equal(pieces: dict[str, Piece], held: StudentState) -> None:
    """What was read is what the engine held, bit by bit."""
    for name, piece in held.pieces.items():
        assert all(torch.equal(part, pieces[name].values[kind]) for kind, part in piece.values.items()), name


def show(seconds: dict[str, list[float]], size: int, parameters: int, ranks: Ranks) -> None:
    title = f"{parameters / 1e6:.1f} M parameters, {size / 2**20:,.0f} MiB over {ranks.world_size} rank(s)"
    table = Table("", "seconds", "MiB/s", "times a plain write", title=title)
    plain = median(seconds["plain write"])
    for arm, values in seconds.items():
        middle = median(values)
        table.add_row(arm, f"{middle:.2f}", f"{size / 2**20 / middle:,.0f}", f"{middle / plain:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()

"""A run folder while the run lasts: what was begun, so that it can be taken up again after a kill, and its checkpoints."""

import json
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from training.config import TrainConfig
from training.dataset import Split, split_of
from training.events import EventLog, Micros

_BEGUN, _CONFIG, _CHECKPOINTS = "begun.json", "begun-config.json", "checkpoints"


@dataclass(frozen=True)
class Begun:
    """What a run set out to do.

    Attributes:
        task: ``tower``, or the name of a head.
        config: how.
        cut: end of the training period, microseconds of Unix time; fixed when the run begins, whatever events come in meanwhile.
    """

    task: str
    config: TrainConfig
    cut: Micros

    def split(self, log: EventLog) -> Split:
        """Returns the time split of a log at this run's cut."""
        return split_of(log, self.config.with_cut(datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=self.cut)))

    @classmethod
    def load(cls, run_dir: Path) -> "Begun":
        """Reads what a run set out to do.

        Raises:
            FileNotFoundError: the folder holds no run that was broken off.
        """
        if not (run_dir / _BEGUN).is_file():
            raise FileNotFoundError(f"{run_dir} holds no training that was broken off")
        values = json.loads((run_dir / _BEGUN).read_text())
        return cls(values["task"], TrainConfig.load(run_dir / _CONFIG), values["cut"])


def begin(run_dir: Path, begun: Begun) -> Begun:
    """Notes what a run sets out to do, and returns it; where the folder says so already, what that says."""
    if not (run_dir / _BEGUN).is_file():
        run_dir.mkdir(parents=True, exist_ok=True)
        begun.config.save(run_dir / _CONFIG)
        (run_dir / _BEGUN).write_text(json.dumps({"task": begun.task, "cut": begun.cut}) + "\n")
    return Begun.load(run_dir)


def checkpoints(run_dir: Path, stage: str = "") -> Path:
    """Returns the folder of the checkpoints of one stage of a run."""
    return run_dir / _CHECKPOINTS / stage


def finish(run_dir: Path) -> None:
    """Removes what only an unfinished run needs."""
    for name in (_BEGUN, _CONFIG):
        (run_dir / name).unlink(missing_ok=True)
    shutil.rmtree(run_dir / _CHECKPOINTS, ignore_errors=True)

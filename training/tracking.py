"""Where a run's figures go while it trains: its own history file always, TensorBoard, Weights & Biases and MLflow as asked."""

import importlib.util
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from training.progress import quiet

Value = str | int | float | bool | None

HISTORY = "history.jsonl"
TRACKERS = ("tensorboard", "wandb", "mlflow")
_PACKAGE = {
    "tensorboard": "tensorboard is not installed; it comes with concord[training]",
    "wandb": "wandb is not installed; it comes with concord[tracking]",
    "mlflow": "mlflow is not installed, and no extra of concord brings it, because its releases do not fit the pinned versions; "
    "install mlflow or mlflow-skinny yourself",
}
_PROJECT = "concord"
_NOT_CAPTURED = ("disable_git", "disable_code", "disable_job_creation", "x_disable_meta")
_MLFLOW_BATCH = 100  # figures a request; one each would be a round trip per optimizer step
_USER_INFO = re.compile(r"(?<=://)[^/\s@]+@")
_SECRET_PARAMETER = re.compile(r"([?&][^=&\s]*(?:token|key|secret|password|sig)[^=&\s]*=)[^&\s]+", re.IGNORECASE)
_SECRET_NAME = re.compile(r"password|passwd|secret|dsn|api_?key|credential", re.IGNORECASE)


class TrackerMissingError(Exception):
    """The package of a tracker that was asked for is not installed; the message names it and says how to get it."""


class Tracker(Protocol):
    """Something that follows a run."""

    def params(self, values: Mapping[str, Value]) -> None:
        """Notes the configuration, once, before the first figure."""

    def scalar(self, name: str, value: float, step: int) -> None:
        """Notes a figure, ``group/name``; the steps of a group grow."""

    def close(self, *, failed: bool = False) -> None:
        """Writes what is left and ends the run."""


class Trackers:
    """Several trackers as one; as a context manager it closes them, and tells them when the run broke off. None is well too."""

    def __init__(self, trackers: Iterable[Tracker] = ()) -> None:
        self._trackers = tuple(trackers)

    def params(self, values: Mapping[str, Value]) -> None:
        """Notes the configuration everywhere, without secrets."""
        for tracker in self._trackers:
            tracker.params(without_secrets(values))

    def scalar(self, name: str, value: float, step: int) -> None:
        """Notes a figure everywhere."""
        for tracker in self._trackers:
            tracker.scalar(name, value, step)

    def close(self, *, failed: bool = False) -> None:
        """Closes all, also when one of them fails to."""
        with ExitStack() as stack:
            for tracker in self._trackers:
                stack.callback(tracker.close, failed=failed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(failed=kind is not None)


class Prefixed:
    """A tracker that knows the figures of one of several trainings by its name, ``name/group/figure``; whoever opened it closes it."""

    def __init__(self, tracker: Tracker, name: str) -> None:
        self._tracker, self._name = tracker, name

    def params(self, values: Mapping[str, Value]) -> None:
        """Does nothing: a run has one configuration."""

    def scalar(self, name: str, value: float, step: int) -> None:
        """Notes a figure under the training's name."""
        self._tracker.scalar(f"{self._name}/{name}", value, step)

    def close(self, *, failed: bool = False) -> None:
        """Does nothing."""


def require_trackers(names: Sequence[str]) -> None:
    """Checks, before anything is trained, that the trackers exist and their packages are installed.

    Raises:
        ValueError: a name is none of ``TRACKERS``.
        TrackerMissingError: a package is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"{name!r} is none of {', '.join(TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise TrackerMissingError(_PACKAGE[name])


def open_trackers(names: Sequence[str], run_dir: Path, *, active: bool = True) -> Trackers:
    """Opens the trackers of a run, beside the history file that a model card needs; none where this process is not to speak.

    Raises:
        ValueError, TrackerMissingError: see ``require_trackers``.
    """
    require_trackers(names)
    if not active:
        return Trackers()
    kinds: dict[str, Callable[[Path], Tracker]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": Mlflow}
    run_dir.mkdir(parents=True, exist_ok=True)
    with quiet():
        return Trackers([*(kinds[name](run_dir) for name in dict.fromkeys(names)), History(run_dir / HISTORY)])


class History:
    """Appends every figure to a file of JSON lines, so that a run that was killed and goes on keeps its curves."""

    def __init__(self, path: Path) -> None:
        before = path.read_text() if path.is_file() else ""
        path.write_text(before[: before.rfind("\n") + 1])  # a line that a kill cut short must not swallow the next one
        self._file = path.open("a", buffering=1)

    def params(self, values: Mapping[str, Value]) -> None:
        """Does nothing: the run folder holds the configuration already."""

    def scalar(self, name: str, value: float, step: int) -> None:
        """Appends one line."""
        self._file.write(json.dumps({"name": name, "step": step, "value": float(value)}) + "\n")

    def close(self, *, failed: bool = False) -> None:
        """Closes the file."""
        self._file.close()


def read_history(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Returns the curves of a history file, (step, value) by name; empty when there is no file.

    A run that was resumed writes steps again: what it wrote later stands. A line being written is left out.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in path.read_text().splitlines(keepends=True) if path.is_file() else ():
        if not line.endswith("\n"):
            continue
        entry = json.loads(line)
        curve = curves.setdefault(entry["name"], [])
        while curve and curve[-1][0] >= entry["step"]:
            curve.pop()
        curve.append((entry["step"], entry["value"]))
    return curves


class TensorBoard:
    """Event files under ``tensorboard/`` of the run folder."""

    def __init__(self, run_dir: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"))

    def params(self, values: Mapping[str, Value]) -> None:
        """Writes the configuration as a table of text."""
        rows = "".join(f"\n| {name} | {value} |" for name, value in values.items())
        self._writer.add_text("configuration", f"| field | value |\n|---|---|{rows}")

    def scalar(self, name: str, value: float, step: int) -> None:
        """Adds a point."""
        self._writer.add_scalar(name, value, step)

    def close(self, *, failed: bool = False) -> None:
        """Writes what is buffered."""
        self._writer.close()


class WeightsAndBiases:
    """A run of the project "concord", under ``wandb/`` of the run folder.

    Offline unless the environment says ``WANDB_MODE=online``: nothing leaves the machine by itself. Neither console output nor
    code, git state, command line or packages are captured.
    """

    def __init__(self, run_dir: Path) -> None:
        import wandb

        self._run: Any = wandb.init(
            project=_PROJECT,
            name=run_dir.name,
            dir=str(run_dir),
            mode="online" if os.environ.get("WANDB_MODE") == "online" else "offline",
            settings=wandb.Settings(silent=True, console="off", **dict.fromkeys(_NOT_CAPTURED, True), x_save_requirements=False),
        )
        self._groups: set[str] = set()

    def params(self, values: Mapping[str, Value]) -> None:
        """Notes the configuration of the run."""
        self._run.config.update(dict(values))

    def scalar(self, name: str, value: float, step: int) -> None:
        """Adds a point; each group has steps of its own, for W&B's own counter would drop those that begin anew."""
        group = name.rpartition("/")[0]
        if group not in self._groups:
            self._groups.add(group)
            self._run.define_metric(f"{group}/*", step_metric=f"{group}/step")
        self._run.log({name: value, f"{group}/step": step})

    def close(self, *, failed: bool = False) -> None:
        """Ends the run."""
        self._run.finish(exit_code=int(failed))


class Mlflow:
    """A run of the experiment "concord", where ``MLFLOW_TRACKING_URI`` says; without it, where the installed MLflow puts runs."""

    def __init__(self, run_dir: Path) -> None:
        import mlflow.entities

        self._metric = mlflow.entities.Metric
        self._client: Any = mlflow.MlflowClient()
        found = self._client.get_experiment_by_name(_PROJECT)
        experiment = found.experiment_id if found else self._client.create_experiment(_PROJECT)
        self._run_id: str = self._client.create_run(experiment, run_name=run_dir.name).info.run_id
        self._waiting: list[Any] = []

    def params(self, values: Mapping[str, Value]) -> None:
        """Notes the configuration of the run."""
        for name, value in values.items():
            self._client.log_param(self._run_id, name, value)

    def scalar(self, name: str, value: float, step: int) -> None:
        """Adds a point; a hundred are sent at once."""
        self._waiting.append(self._metric(name, float(value), int(1000 * time.time()), step))
        if len(self._waiting) >= _MLFLOW_BATCH:
            self._flush()

    def close(self, *, failed: bool = False) -> None:
        """Sends what waits and ends the run."""
        self._flush()
        self._client.set_terminated(self._run_id, "FAILED" if failed else "FINISHED")

    def _flush(self) -> None:
        self._client.log_batch(self._run_id, metrics=self._waiting)
        self._waiting = []


def without_secrets(values: Mapping[str, Value]) -> dict[str, Value]:
    """Returns the values with passwords masked: user and password of an address, telling parameters, telling names."""
    return {name: "***" if _SECRET_NAME.search(name) and value else _masked(value) for name, value in values.items()}


def _masked(value: Value) -> Value:
    return _SECRET_PARAMETER.sub(r"\1***", _USER_INFO.sub("***@", value)) if isinstance(value, str) else value

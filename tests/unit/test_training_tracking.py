"""What follows a run: its history over kills, TensorBoard's and W&B's own files read back, MLflow's absence, no secrets."""

import json
import logging
import os
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from training.tracking import HISTORY, TrackerMissingError, Trackers, Value, open_trackers, read_history, require_trackers, without_secrets

ADDRESS = "https://anna:hunter2@hub.example/bert?token=hunter2&rev=1"
PARAMS = {"seed": 3, "user_tokens": 64, "cut": "", "base_model": ADDRESS, "dsn": "hunter2"}


def test_a_history_gives_back_its_curves(tmp_path: Path) -> None:
    with open_trackers((), tmp_path) as tracker:
        for step in range(1, 4):
            tracker.scalar("train/loss", 1 / step, step)
        tracker.scalar("validation/ndcg_at_10", 0.5, 3)
    assert read_history(tmp_path / HISTORY) == {"train/loss": [(1, 1.0), (2, 0.5), (3, 1 / 3)], "validation/ndcg_at_10": [(3, 0.5)]}
    assert read_history(tmp_path / "none") == {}


def test_a_killed_and_resumed_run_keeps_one_curve(tmp_path: Path) -> None:
    killed = (
        "from training.tracking import open_trackers; from pathlib import Path; import os, signal, sys\n"
        "tracker = open_trackers((), Path(sys.argv[1]))\n"
        "for step in range(1, 9): tracker.scalar('train/loss', step, step)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", killed, str(tmp_path)], timeout=60, check=False).returncode == -9
    with (tmp_path / HISTORY).open("a") as file:
        file.write('{"name": "train/loss", "st')  # a line the kill cut short
    assert [step for step, _ in read_history(tmp_path / HISTORY)["train/loss"]] == list(range(1, 9))
    with open_trackers((), tmp_path) as tracker:  # goes on from a checkpoint of step 5 and stops earlier than before
        for step in (6, 7):
            tracker.scalar("train/loss", -step, step)
    assert read_history(tmp_path / HISTORY) == {"train/loss": [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, -6), (7, -7)]}


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_trackers(["tensorboard"], tmp_path) as tracker:
        tracker.params(PARAMS)
        tracker.scalar("train/loss", 0.25, 7)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(7, 0.25)]
    assert "| user_tokens | 64 |" in events.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0].decode()
    assert b"hunter2" not in everything(tmp_path)


def everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # W&B's own pipes to its service
def test_wandb_runs_offline_and_holds_figures_but_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("CONCORD_POSTGRES_DSN", "postgresql://concord:hunter2@db/shop")
    monkeypatch.setenv("WANDB_API_KEY", "hunter2" * 8)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    level = logging.root.level
    try:
        with open_trackers(["wandb"], tmp_path) as tracker:
            tracker.params(PARAMS)
            for step in (1, 2):
                tracker.scalar("train/loss", 1 / step, step)
            tracker.scalar("ranker/loss", 0.75, 1)  # a group whose steps begin anew
        written = finished_records(tmp_path)
    finally:
        wandb.teardown()
        logging.root.setLevel(level)
    config = {item.key: json.loads(item.value_json) for record in written if record.HasField("config") for item in record.config.update}
    assert (config["seed"], config["base_model"]) == (3, "https://***@hub.example/bert?token=***&rev=1")
    histories = [record.history.item for record in written if record.HasField("history")]
    points = [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items} for items in histories]
    assert [(point["train/step"], point["train/loss"]) for point in points if "train/loss" in point] == [(1, 1.0), (2, 0.5)]
    assert [(point["ranker/step"], point["ranker/loss"]) for point in points if "ranker/loss" in point] == [(1, 0.75)]
    assert b"hunter2" not in everything(tmp_path)
    assert not list(tmp_path.rglob("requirements.txt"))


def finished_records(folder: Path):  # type: ignore[no-untyped-def]
    """Reads W&B's log (LevelDB's format, all records whole below 32 KiB) once its service has written the last one."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.rglob("*.wandb")
    until = time.monotonic() + 20
    while True:
        data, at, records = path.read_bytes(), 7, []
        while at < len(data):
            _, size, kind = struct.unpack("<IHB", data[at : at + 7])
            assert kind == 1
            records.append(Record.FromString(data[at + 7 : at + 7 + size]))
            at += 7 + size
        if records and records[-1].HasField("exit"):
            return records
        assert time.monotonic() < until, "W&B did not finish its file"
        time.sleep(0.05)


def test_a_tracker_whose_package_is_missing_is_named_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(TrackerMissingError, match="mlflow is not installed"):
        open_trackers(["tensorboard", "mlflow"], tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="'comet' is none of tensorboard, wandb, mlflow"):
        require_trackers(["comet"])


class Recorder:
    """Notes what a tracker is told."""

    def __init__(self, *, breaks: bool = False) -> None:
        self.told: list[object] = []
        self.breaks = breaks

    def params(self, values: Mapping[str, Value]) -> None:
        self.told.append(dict(values))

    def scalar(self, name: str, value: float, step: int) -> None:
        self.told.append((name, value, step))

    def close(self, *, failed: bool = False) -> None:
        self.told.append("failed" if failed else "closed")
        if self.breaks:
            raise OSError("disk full")


def test_all_trackers_are_told_and_closed_even_when_one_breaks() -> None:
    first, second = Recorder(), Recorder(breaks=True)
    tracker = Trackers([first, second])
    tracker.params({"api_key": "x", "seed": 1})
    tracker.scalar("a/b", 2.0, 3)
    with pytest.raises(OSError, match="disk full"):
        tracker.close()
    assert first.told == second.told == [{"api_key": "***", "seed": 1}, ("a/b", 2.0, 3), "closed"]


def test_a_run_that_breaks_off_says_so() -> None:
    recorder = Recorder()
    with pytest.raises(KeyError), Trackers([recorder]):
        raise KeyError
    assert recorder.told == ["failed"]


def test_a_process_that_is_not_the_first_writes_nothing(tmp_path: Path) -> None:
    with open_trackers(["tensorboard"], tmp_path / "run", active=False) as tracker:
        tracker.scalar("train/loss", 1.0, 1)
    assert not os.path.lexists(tmp_path / "run")


def test_secrets_are_masked_and_settings_are_not() -> None:
    assert without_secrets(PARAMS) == {
        "seed": 3,
        "user_tokens": 64,
        "cut": "",
        "base_model": "https://***@hub.example/bert?token=***&rev=1",
        "dsn": "***",
    }
    assert without_secrets({"base_model": "/models/bert", "sampled": True}) == {"base_model": "/models/bert", "sampled": True}

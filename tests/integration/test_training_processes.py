"""A training that is killed and resumed, or shared by two processes, is the training that one process does in one go."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.integration.tower_job import CONFIG, train
from training.dataset import TrainingDataError

ROOT = Path(__file__).parents[2]


def job(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def equal_weights(left: Path, right: Path) -> bool:
    a, b = (load_file(folder / "tower.safetensors") for folder in (left, right))
    return a.keys() == b.keys() and all(np.array_equal(a[name].numpy(), b[name].numpy()) for name in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    report = train(CONFIG, folder)
    assert report.steps == len(report.losses) == CONFIG.max_steps
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that kill -9 ended at its eighth step, after the checkpoint of the sixth."""
    folder = tmp_path_factory.mktemp("killed")
    done = job("-m", "tests.integration.tower_job", str(folder), "--kill-at", "8")
    assert done.returncode == -9, done.stderr
    assert not (folder / "losses.json").exists()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000006"]
    return folder


def test_a_checkpoint_is_of_no_use_on_other_data(killed: Path) -> None:
    with pytest.raises(TrainingDataError, match="have changed since this run began"):
        train(replace(CONFIG, user_tokens=8), killed)


def test_a_run_killed_and_resumed_gives_the_same_losses_and_weights_to_the_bit(whole: Path, killed: Path) -> None:
    train(CONFIG, killed)
    assert json.loads((killed / "losses.json").read_text()) == json.loads((whole / "losses.json").read_text())
    assert equal_weights(whole, killed)


def test_two_runs_of_one_seed_are_equal_to_the_bit_and_of_another_are_not(whole: Path, tmp_path: Path) -> None:
    again, other = tmp_path / "again", tmp_path / "other"
    for folder, config in ((again, CONFIG), (other, replace(CONFIG, seed=5))):
        folder.mkdir()
        train(replace(config, checkpoint_steps=0), folder)
    assert equal_weights(whole, again)
    assert not equal_weights(whole, other)
    assert not (again / "checkpoints").exists()


def test_adalora_resumes_with_its_ranks(tmp_path: Path) -> None:
    """The checkpoint is that of the ninth step, when the ranks are fixed already; the two steps after it are done twice."""
    config = replace(CONFIG, regime="adalora", adapter_rank=2)
    whole = train(config, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000009"]
    weights = load_file(tmp_path / "tower.safetensors")
    assert train(config, tmp_path).losses == whole.losses
    assert all(np.array_equal(value, weights[name]) for name, value in load_file(tmp_path / "tower.safetensors").items())


def test_two_processes_give_the_losses_of_one(tmp_path: Path) -> None:
    """Without dropout, whose noise is drawn per process; with an odd batch, which they cannot share evenly."""
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    settings = {"dropout": "0", "batch_size": "15"}
    for folder in (alone, shared):
        folder.mkdir()
    train(CONFIG.with_values(settings), alone)
    assigned = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    done = job(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.integration.tower_job", str(shared), *assigned
    )
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((folder / "losses.json").read_text()) for folder in (alone, shared))
    assert len(one) == len(two) == CONFIG.max_steps
    assert np.allclose(one, two, atol=2e-4), (one, two)
    assert np.ptp(one) > 0.1  # the losses move by far more than they may differ

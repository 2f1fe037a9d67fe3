"""What a run's card says of its data, base model, time and hardware; noted while training, for it cannot be asked later."""

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch

from training.config import TrainConfig
from training.dataset import Shop, Split
from training.distributed import world_size
from training.events import Micros
from training.labels import Labels
from training.text import TINY, base_name, base_path

_FILE = "facts.json"
_VERSIONS = ("torch", "transformers", "onnxruntime-gpu", "numpy")
_NOT_STATED = "not stated in the model's folder; ask its publisher"


@dataclass(frozen=True)
class Facts:
    """Of one run.

    Attributes:
        base_model, base_licence: the pretrained model and its licence.
        first_event, last_event, ranker_start, cut: of the data, microseconds of Unix time; see ``training.dataset.Split``.
        counts: of customers, items, events and labels.
        hardware: what it ran on, as named values.
    """

    base_model: str
    base_licence: str
    first_event: Micros
    last_event: Micros
    ranker_start: Micros
    cut: Micros
    counts: dict[str, int] = field(default_factory=dict)
    hardware: dict[str, str] = field(default_factory=dict)

    def save(self, run_dir: Path) -> None:
        """Writes them into the run folder."""
        (run_dir / _FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, run_dir: Path) -> "Facts":
        """Reads what ``save`` wrote.

        Raises:
            FileNotFoundError: the run was made by a release that did not note them.
        """
        return cls(**json.loads((run_dir / _FILE).read_text()))


def facts_of(shop: Shop, split: Split, labels: Labels, config: TrainConfig) -> Facts:
    """Collects the facts of the run that trains in this process."""
    first, last = shop.log.window()
    return Facts(
        base_model=base_name(config.base_model),
        base_licence=base_licence(config.base_model),
        first_event=first,
        last_event=last,
        ranker_start=split.ranker_start,
        cut=split.cut,
        counts={
            "customers": len(shop.log.users),
            "items": len(shop.table),
            "events": len(shop.log),
            "visits the tower trained on": len(labels.tower),
            "visits the tower was validated on": len(labels.validation),
            "visits the ranker trained on": len(labels.ranker),
            "customers with a visit after the cut": len(labels.holdout),
        },
        hardware=hardware(),
    )


def base_licence(base_model: str) -> str:
    """Returns the licence that a base model's folder states in the head of its README, where publishers put it."""
    if base_model == TINY:
        return "none: random weights"
    readme = Path(base_path(base_model)) / "README.md"
    head = readme.read_text().split("---")[1:2] if readme.is_file() else []
    stated = [line.partition(":")[2].strip() for part in head for line in part.splitlines() if line.startswith("license:")]
    return stated[0] if stated else _NOT_STATED


def hardware() -> dict[str, str]:
    """Describes what this process runs on."""
    devices = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "processor": f"{_processor()}, {os.cpu_count()} logical cores",
        "threads of PyTorch": str(torch.get_num_threads()),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "accelerators": ", ".join(devices) or "none",
        "processes": str(world_size()),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {version(name)}" for name in _VERSIONS),
    }


def _processor() -> str:
    """Returns the processor's name; Linux keeps it where ``platform`` does not look."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

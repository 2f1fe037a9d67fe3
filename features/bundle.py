"""The model bundle: the one thing that passes from training/ to server/. A folder with a manifest and checksummed files."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Final, Literal, Self

import fsspec
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from features.sequence import SequenceSpec

MANIFEST = "manifest.json"
ENCODER = "encoder.onnx"
ENCODER_FP16 = "encoder.fp16.onnx"  # optional: for CUDA, where a server asks for it
RANKER = "ranker.onnx"
TOKENIZER = "tokenizer.json"
ITEMS = "items.npz"
COLLABORATIVE = "collaborative.npz"
GOLDEN = "golden.npz"
CARD_HTML = "model_card.html"  # the cards are for people: no server reads them
CARD_MARKDOWN = "model_card.md"
TRAINING = "training.safetensors"  # optional: what an update starts from; no server reads it
TOWER = "tower.onnx"
FORMAT: Final = 3
"""Of what a bundle holds and of what it reads. 1 and 2 read customers' states in which actions were names and ratings were not said."""
REQUIRED_FILES = (ENCODER, RANKER, TOKENIZER, ITEMS, COLLABORATIVE, GOLDEN)


class BundleError(Exception):
    """A bundle is missing, damaged or not of a format this release reads; the message names the file."""


class FeatureRef(BaseModel):
    """One feature a model was trained on: ``view:feature`` and its Feast type as text, such as ``Array(String)``."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    ref: str
    dtype: str


class FeatureContract(BaseModel):
    """The Feast feature service a bundle was trained on; a server refuses a bundle the registry no longer satisfies."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    features: tuple[FeatureRef, ...]


class Invariance(BaseModel):
    """Whether what a graph computes for one input depends on what it runs beside.

    Attributes:
        bit_equal: it does not, to the bit.
        largest_difference: of any output component, absolute.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    bit_equal: bool
    largest_difference: float


ClassifierName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,31}$")]


class Classifier(BaseModel):
    """A text classifier that a bundle carries beside its towers; ``classifier_files`` names its files.

    Its graph reads ``input_ids, attention_mask`` int64[b, l] and gives ``logits`` float32[b, n], one for each of n labels.

    Attributes:
        labels: what the logits stand for, in order; two at least.
        tokens: of a text these many are read, the tokenizer's own marks included.
        own_tokenizer: whether it reads with a tokenizer of its own; else with the encoder's.
        temperature: logits are divided by it before the softmax, fitted on validation so that probabilities are calibrated; above 0.
        threshold: a text whose likeliest label is less probable than this is none of the labels' business; None where every text is.
        base_model: the pretrained model it was fine-tuned from, or a word for where its weights began.
        metrics: on what it was validated on, and of its baselines.
        parity: largest absolute difference between PyTorch's and ONNX Runtime's logits.
        invariance: of the graph, as ``Manifest.invariance``.
        settings: the training configuration, for the record.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    labels: tuple[str, ...] = Field(min_length=2)
    tokens: int = Field(ge=3)
    own_tokenizer: bool
    temperature: float = Field(gt=0)
    threshold: float | None = Field(default=None, ge=0, le=1)
    base_model: str
    metrics: dict[str, float]
    parity: float
    invariance: dict[str, Invariance]
    settings: dict[str, str | int | float | bool | None]


@dataclass(frozen=True)
class ClassifierFiles:
    """What the files of a classifier are called, in a bundle and in the folder that its training leaves."""

    graph: str
    tokenizer: str
    golden: str


def classifier_files(name: str) -> ClassifierFiles:
    """Returns the file names of the classifier ``name``; ``golden`` holds ``input_ids``, ``lengths`` and ``logits`` of single runs."""
    return ClassifierFiles(f"classifier.{name}.onnx", f"classifier.{name}.tokenizer.json", f"classifier.{name}.golden.npz")


class Manifest(BaseModel):
    """What a bundle says of itself.

    Attributes:
        format: ``FORMAT``; a bundle of another one is refused, here and by the releases that wrote it.
        model_version: name of the version, unique in the registry.
        created_at: when it was exported (UTC).
        base_model: the pretrained BERT it was fine-tuned from.
        tower: kind of user tower: the encoder over the behaviour text, or ``tower.onnx`` over the behaviour sequence.
        vector_size: components of item and user vectors.
        item_tokens, user_tokens: the encoder truncates item texts and behaviour texts to these many tokens.
        behaviour_limit: phrases written into a behaviour text at the most.
        sequence: how the sequence tower reads behaviours; None for a text tower.
        half_life_days: of features.signals.SignalConfig.
        ranking_features: columns of the ranker's input, in order.
        candidate_count: rows of the ranker's input.
        contract: the feature service and its types.
        metrics: holdout metrics of this model and its baselines, e.g. ``ndcg_at_10`` and ``popularity_ndcg_at_10``.
        parity: largest absolute difference between PyTorch and ONNX Runtime outputs, by graph.
        invariance: by graph file and property (``batch_size`` from 1 to 64, ``padding``, ``order``), measured at export on the CPU;
            empty in bundles of releases that did not measure it.
        classifiers: text classifiers by name, such as ``intent``.
        data_from, data_until: window of the events it was trained on.
        settings: the training configuration, for the record.
        files: SHA-256 of every file, by name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
    format: Literal[3] = FORMAT
    model_version: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    created_at: datetime
    base_model: str
    tower: Literal["text", "sequence"]
    vector_size: int
    item_tokens: int
    user_tokens: int
    behaviour_limit: int
    sequence: SequenceSpec | None = None
    half_life_days: float
    ranking_features: tuple[str, ...]
    candidate_count: int
    contract: FeatureContract
    metrics: dict[str, float]
    parity: dict[str, float]
    invariance: dict[str, dict[str, Invariance]] = {}
    classifiers: dict[ClassifierName, Classifier] = {}
    data_from: datetime
    data_until: datetime
    settings: dict[str, str | int | float | bool | None]
    files: dict[str, str]

    @model_validator(mode="after")
    def _tower_is_whole(self) -> Self:
        """A sequence tower comes with how it reads behaviours, a text tower without."""
        if (self.sequence is not None) != (self.tower == "sequence"):
            raise ValueError(f"a {self.tower} tower {'lacks' if self.sequence is None else 'has no use for'} 'sequence'")
        return self

    @property
    def required_files(self) -> tuple[str, ...]:
        """The files without which such a bundle is none."""
        tower = (TOWER,) if self.tower == "sequence" else ()
        return (*REQUIRED_FILES, *tower, *(file for name in self.classifiers for file in self.files_of(name)))

    def files_of(self, classifier: str) -> tuple[str, ...]:
        """Returns the files that a classifier brings."""
        files = classifier_files(classifier)
        own = (files.tokenizer,) if self.classifiers[classifier].own_tokenizer else ()
        return (files.graph, files.golden, *own)


def checksum(path: Path) -> str:
    """Returns the SHA-256 of a file as hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(folder: Path) -> Mapping[str, str]:
    """Returns the checksum of every file of a bundle folder but its manifest."""
    return {path.name: checksum(path) for path in sorted(folder.iterdir()) if path.is_file() and path.name != MANIFEST}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes ``manifest.json``: the last step of an export."""
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")


def require_format(manifest: object, name: str) -> None:
    """Refuses a manifest, as JSON has it, of a release whose models read customers' states otherwise.

    Raises:
        BundleError: it is of an earlier format; the message says to train again.
    """
    if isinstance(manifest, dict) and manifest.get("format") in (1, 2):
        model = f"{manifest.get('model_version', name)}: format {manifest['format']}"
        remedy = "train again and publish the new model (concord train, concord export, concord publish)"
        raise BundleError(f"{model} reads customers as an earlier release kept them; {remedy}")


def read_bundle(folder: Path) -> Manifest:
    """Reads and verifies a bundle folder: the manifest, every file it names and every file the format requires.

    Raises:
        BundleError: naming the file that is missing, unreadable or whose checksum differs; or it is of an earlier format.
    """
    try:
        written = json.loads((folder / MANIFEST).read_bytes())
        require_format(written, folder.name)
        manifest = Manifest.model_validate(written)
    except FileNotFoundError:
        raise BundleError(f"{folder.name}: {MANIFEST} is missing") from None
    except (OSError, ValidationError, ValueError) as error:
        raise BundleError(f"{folder.name}: {MANIFEST} cannot be read: {_first_line(error)}") from None
    for name in manifest.required_files:
        if name not in manifest.files:
            raise BundleError(f"{manifest.model_version}: {MANIFEST} names no {name}")
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise BundleError(f"{manifest.model_version}: {name} is missing")
        if checksum(path) != expected:
            raise BundleError(f"{manifest.model_version}: checksum of {name} differs from the manifest")
    return manifest


def upload(folder: Path, url: str) -> None:
    """Copies a bundle folder to ``url`` (any fsspec URL); the manifest goes last, so a half-copied bundle is never read."""
    filesystem, target = fsspec.core.url_to_fs(url)
    filesystem.makedirs(target, exist_ok=True)
    names = [path.name for path in sorted(folder.iterdir()) if path.is_file() and path.name != MANIFEST]
    for name in [*names, MANIFEST]:
        filesystem.put_file(str(folder / name), f"{target}/{name}")


def fetch(url: str, folder: Path) -> Manifest:
    """Copies the bundle at ``url`` into ``folder`` unless it is already there whole, and verifies it.

    Processes of one machine take turns: two that copied at once would each find the other's half-written files.

    Raises:
        BundleError: nothing readable stands at ``url``, or what was fetched is damaged.
    """
    with suppress(BundleError):  # not here, or damaged since: a disk that was full must not keep a good bundle away for ever
        return read_bundle(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        with suppress(BundleError):  # fetched while this one waited
            return read_bundle(folder)
        _copy(url, folder)
        return read_bundle(folder)


def _copy(url: str, folder: Path) -> None:
    filesystem, source = fsspec.core.url_to_fs(url)
    try:
        names = sorted(str(entry).rsplit("/", 1)[-1] for entry in filesystem.ls(source, detail=False))
        for name in [name for name in names if name != MANIFEST] + [MANIFEST]:
            filesystem.get_file(f"{source}/{name}", str(folder / name))
    except (OSError, ValueError) as error:
        raise BundleError(f"no bundle at the registered address: {_first_line(error)}") from None


def fetch_file(url: str, name: str, path: Path, *, expected: str) -> None:
    """Copies one file of the bundle at ``url`` to ``path`` and compares its SHA-256 with ``expected``.

    Raises:
        BundleError: it cannot be read, or is damaged.
    """
    filesystem, source = fsspec.core.url_to_fs(url)
    try:
        filesystem.get_file(f"{source}/{name}", str(path))
    except (OSError, ValueError) as error:
        raise BundleError(f"no {name} at the registered address: {_first_line(error)}") from None
    if checksum(path) != expected:
        raise BundleError(f"checksum of {name} differs from the manifest")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

"""A loaded bundle: sessions of its graphs, tokenizer, item vectors and collaborative weights, proved by golden outputs."""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import structlog
from tokenizers import Tokenizer

from features.behaviour import Activity, behaviour_text
from features.bundle import (
    COLLABORATIVE,
    ENCODER,
    ENCODER_FP16,
    GOLDEN,
    ITEMS,
    RANKER,
    TOKENIZER,
    TOWER,
    BundleError,
    Manifest,
    read_bundle,
)
from features.item_table import FloatArray, ItemTable
from features.ranking import RANKING_FEATURES
from features.retrieval import VectorArray, stored_type
from features.sequence import TOWER_INPUTS, SequenceSpec, behaviour_sequence, tower_inputs
from features.signals import CollaborativeWeights, SignalConfig
from server.errors import UnavailableError
from server.inference.batching import Sharing
from server.inference.classifier import LoadedClassifier, load_classifier
from server.inference.golden import GOLDEN_TOLERANCE, compare_golden
from server.inference.session import open_session, provider_of
from server.inference.sharing import claimed, proved
from server.inference.tokens import Rows, Tokenizers, Tokens, padded, read_tokens
from server.tracing import span

_log = structlog.get_logger(__name__)
# The golden outputs are the fp32 encoder's: half precision differs from them by 1e-3 and more, a wrong graph by 0.2.
_GOLDEN_TOLERANCE_FP16 = 2e-2
# Searches and messages whose vectors are remembered: 6 MB of 384 components, and many customers search alike.
_REMEMBERED_TEXTS = 4096
# Customers whose vector is remembered, at about 3 KB: RankItems and every surface of a customer run the encoder once a version.
_REMEMBERED_USERS = 8192


@dataclass(frozen=True)
class LoadedModel:
    """Everything a bundle brings, ready to answer. Runs are single and unpadded (encoder) or of one fixed shape (tower, ranker).

    Attributes:
        tower: the sequence tower, None where the encoder reads behaviours as text.
        item_rows: bundle row of each item id.
        item_hashes: content hash each bundle vector was made from.
        item_vectors: float32[m, d] or of a large catalogue float16[m, d], unit length.
        collaborative: weights over the bundle's m rows.
        classifiers: text classifiers by name.
        sharing: with what a text may share a run of the encoder and keep its bits.
    """

    manifest: Manifest
    encoder: ort.InferenceSession
    tower: ort.InferenceSession | None
    ranker: ort.InferenceSession
    tokenizer: Tokenizer
    item_rows: dict[str, int]
    item_hashes: tuple[str, ...]
    item_vectors: VectorArray
    collaborative: CollaborativeWeights
    classifiers: Mapping[str, LoadedClassifier]
    sharing: Sharing = Sharing.NONE

    @property
    def model_version(self) -> str:
        """The bundle's version name."""
        return self.manifest.model_version

    @property
    def provider(self) -> str:
        """``cuda`` or ``cpu``."""
        return provider_of(self.encoder)

    @cached_property
    def signals(self) -> SignalConfig:
        """Constants of the signals the ranker was trained with."""
        return SignalConfig(self.manifest.half_life_days)

    def user_vector(self, activity: Activity, table: ItemTable, vectors: VectorArray) -> FloatArray | None:
        """Returns the unit user vector, float32[d], or None when the behaviours say nothing the model could read.

        Args:
            activity: the customer's behaviours.
            table: the epoch's n items.
            vectors: float32[n, d] or float16[n, d], their unit vectors.
        """
        if (spec := self.manifest.sequence) is not None:
            return self._sequence_vector(activity, table, vectors, spec=spec)
        text = behaviour_text(activity, table.title_of, limit=self.manifest.behaviour_limit)
        return self._behaviour_vector(text) if text else None

    # Both know the model weakly: held in a circle with its own memory, a replaced model would keep its 100 MB until Python looks for
    # circles, which may be many replacements later.
    @cached_property
    def _behaviour_vector(self) -> Callable[[str], FloatArray]:
        """User vectors of behaviours; those asked for last are remembered: an event makes another text, all else asks again."""
        model = weakref.proxy(self)
        return lru_cache(_REMEMBERED_USERS)(lambda text: model._encode(text, "user_vector", model.manifest.user_tokens))

    @cached_property
    def text_vector(self) -> Callable[[str], FloatArray]:
        """Vectors of searches and messages, in the space of the items; those asked for last are remembered."""
        model = weakref.proxy(self)
        return lru_cache(_REMEMBERED_TEXTS)(lambda text: model.item_vector(text))

    def _sequence_vector(self, activity: Activity, table: ItemTable, vectors: VectorArray, *, spec: SequenceSpec) -> FloatArray | None:
        sequence = behaviour_sequence(activity, table.rows, spec)
        return self._run_tower(tower_inputs(sequence, sequence.vectors(vectors, self.text_vector), spec)) if len(sequence) else None

    def _run_tower(self, inputs: "dict[str, np.ndarray[Any, Any]]") -> FloatArray:
        assert self.tower is not None
        with span("onnx tower", {"concord.model_version": self.model_version, "concord.behaviours": int(inputs["length"][0])}):
            vector: FloatArray = self.tower.run(["user_vector"], inputs)[0][0]
        return vector

    def item_vector(self, text: str) -> FloatArray:
        """Returns the unit vector of an item the bundle does not carry, or of a search or message, float32[d]."""
        return self._encode(text, "item_vector", self.manifest.item_tokens)

    def passage_vector(self, text: str) -> FloatArray:
        """Returns the unit vector of a passage or a question, float32[d], among the items: as much is read as of behaviours."""
        return self._encode(text, "item_vector", self.manifest.user_tokens)

    def _encode(self, text: str, output: str, limit: int) -> FloatArray:
        vector: FloatArray = self.text_vectors([self.tokens(text, limit).ids], output)[0]
        return vector

    def tokens(self, text: str, limit: int) -> Tokens:
        """Reads a text as the encoder does: its first tokens, ``limit`` of them at the most."""
        return read_tokens(self.tokenizer, text, limit)

    def text_vectors(self, rows: Rows, output: str) -> FloatArray:
        """Runs the encoder once: rows of token ids, padded at their ends where they differ in length, to float32[rows, d].

        ``output`` is ``user_vector`` or ``item_vector``. What may run together without changing a bit is said by ``sharing``.
        """
        inputs = padded(rows)
        with span("onnx encoder", {"concord.model_version": self.model_version, "concord.tokens": inputs["input_ids"].size}):
            vectors: FloatArray = self.encoder.run([output], inputs)[0]
        return vectors

    def rank(self, matrix: FloatArray) -> FloatArray:
        """Scores candidates: float32[c, f] → float32[c], in runs of the graph's fixed height."""
        height = self.manifest.candidate_count
        scores = []
        for start in range(0, len(matrix), height):
            part = matrix[start : start + height]
            padded = np.zeros((height, matrix.shape[1]), np.float32)
            padded[: len(part)] = part
            with span("onnx ranker", {"concord.model_version": self.model_version, "concord.candidates": len(part)}):
                scores.append(self.ranker.run(["scores"], {"features": padded})[0][: len(part)])
        return np.concatenate(scores) if scores else np.zeros(0, np.float32)

    def check_golden(self, folder: Path, *, precision: str = "fp32") -> None:
        """Compares this machine's outputs with those recorded at export; a damaged or wrong graph cannot pass.

        Raises:
            BundleError: an output differs by more than the tolerance.
        """
        golden, allowed = np.load(folder / GOLDEN), _GOLDEN_TOLERANCE_FP16 if precision == "fp16" else GOLDEN_TOLERANCE
        for k, length in enumerate(golden["lengths"]):
            ids = golden["input_ids"][k : k + 1, :length]
            for output in ("user_vector", "item_vector"):
                compare_golden(self.model_version, output, self.text_vectors(ids, output)[0], golden[f"{output}s"][k], allowed=allowed)
        if self.tower is not None:
            for k, expected in enumerate(golden["tower_user_vectors"]):
                seen = self._run_tower({name: golden[f"tower_{name}"][k : k + 1] for name in TOWER_INPUTS})
                compare_golden(self.model_version, "tower", seen, expected)
        compare_golden(self.model_version, "scores", self.rank(golden["ranker_features"]), golden["ranker_scores"])


def load_model(folder: Path, *, provider: str, threads: int, precision: str = "fp32", tokenizers: Tokenizers | None = None) -> LoadedModel:
    """Opens a bundle folder: checksums, sessions, then golden outputs.

    Args:
        folder: the bundle.
        provider: ``cpu``, ``cuda`` or ``auto``, of the encoder.
        threads: intra-op threads of the encoder.
        precision: ``fp32``, or ``fp16`` for the bundle's half-precision encoder, which runs on CUDA only.
        tokenizers: where models share one.

    Raises:
        BundleError: the bundle is damaged, of another format, has no encoder of this precision, or its ranker expects other
            features than this release computes.
        UnavailableError: CUDA was demanded, or is needed for fp16, and is not there.
    """
    manifest = read_bundle(folder)
    if manifest.ranking_features != RANKING_FEATURES:
        raise BundleError(f"{manifest.model_version}: {RANKER} was trained on other ranking features than this release computes")
    tokenizers = tokenizers or Tokenizers()
    try:
        tokenizer = tokenizers.open(folder / TOKENIZER, manifest.files[TOKENIZER])
        encoder = _open_encoder(folder, manifest, provider=provider, threads=threads, precision=precision)
        classifiers = {
            name: load_classifier(folder, manifest, name, provider=provider, threads=threads, tokenizers=tokenizers)
            for name in manifest.classifiers
        }
        model = _open(folder, manifest, tokenizer, encoder, classifiers)
        model.check_golden(folder, precision=precision)
        _warn_of_batch(manifest)
        model = replace(model, sharing=_sharing(model))
    except (BundleError, UnavailableError):
        raise
    except Exception as error:  # noqa: BLE001 - fifteen types of ONNX Runtime share no base, tokenizers raises Exception itself
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise BundleError(f"{manifest.model_version}: cannot be opened: {line}") from None
    return model


def _sharing(model: LoadedModel) -> Sharing:
    """Returns what the bundle claims, as far as it is true here; a claim that is not is warned of."""
    claim = claimed(model.manifest.invariance.get(ENCODER, {}), provider=model.provider)

    def run(rows: Rows) -> FloatArray:
        return np.hstack([model.text_vectors(rows, output) for output in ("user_vector", "item_vector")])

    found = proved(claim, run, vocabulary=model.tokenizer.get_vocab_size())
    if found is not claim:
        _log.warning("encoder depends on its batch here", model_version=model.model_version, claimed=claim.value, proved=found.value)
    return found


def _warn_of_batch(manifest: Manifest) -> None:
    """Warns where a graph's outputs depend on what the server runs it with: the ranker is padded, the encoder runs alone."""
    for name, measured in manifest.invariance.get(RANKER, {}).items():
        if not measured.bit_equal:
            version, difference = manifest.model_version, measured.largest_difference
            _log.warning("ranker depends on its batch", model_version=version, of=name, largest_difference=difference)


def _open_encoder(folder: Path, manifest: Manifest, *, provider: str, threads: int, precision: str) -> ort.InferenceSession:
    if precision != "fp16":
        return open_session(folder / ENCODER, provider=provider, threads=threads)
    if ENCODER_FP16 not in manifest.files:
        raise BundleError(f"{manifest.model_version}: has no {ENCODER_FP16}; `concord export --fp16` writes one")
    return open_session(folder / ENCODER_FP16, provider="cuda", threads=threads)  # on the CPU half precision is only slower


def _open(
    folder: Path,
    manifest: Manifest,
    tokenizer: Tokenizer,
    encoder: ort.InferenceSession,
    classifiers: Mapping[str, LoadedClassifier],
) -> LoadedModel:
    ranker = open_session(folder / RANKER, provider="cpu", threads=1)  # 256 × 23 numbers: the copy to a GPU costs more
    # One customer's 50 behaviours: on one thread, as the ranker, it takes less than waking others.
    tower = open_session(folder / TOWER, provider="cpu", threads=1) if manifest.tower == "sequence" else None
    items, weights = np.load(folder / ITEMS), np.load(folder / COLLABORATIVE)
    return LoadedModel(
        manifest=manifest,
        encoder=encoder,
        tower=tower,
        ranker=ranker,
        tokenizer=tokenizer,
        item_rows={str(item): row for row, item in enumerate(items["item_ids"])},
        item_hashes=tuple(str(h) for h in items["content_hashes"]),
        item_vectors=items["vectors"].astype(stored_type(len(items["item_ids"])), copy=False),
        collaborative=CollaborativeWeights(weights["indptr"], weights["indices"], weights["weights"]),
        classifiers=classifiers,
    )

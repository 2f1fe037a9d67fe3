"""A loaded text classifier of a bundle: its session and tokenizer, proved by golden outputs."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import structlog
from tokenizers import Tokenizer

from features.bundle import TOKENIZER, BundleError, Classifier, Manifest, classifier_files
from features.item_table import FloatArray
from server.inference.batching import Sharing
from server.inference.golden import compare_golden
from server.inference.session import open_session, provider_of
from server.inference.sharing import claimed, proved
from server.inference.tokens import Rows, Tokenizers, Tokens, padded, read_tokens
from server.tracing import span

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class LoadedClassifier:
    """Ready to answer.

    Attributes:
        name: its name in the bundle.
        spec: what the bundle says of it.
        sharing: with what a text may share a run and keep its bits.
    """

    name: str
    spec: Classifier
    session: ort.InferenceSession
    tokenizer: Tokenizer
    sharing: Sharing = Sharing.NONE

    def tokens(self, text: str) -> Tokens:
        """Reads a text as far as the classifier was trained to."""
        return read_tokens(self.tokenizer, text, self.spec.tokens)

    def logits(self, rows: Rows) -> FloatArray:
        """Runs the graph once: rows of token ids to float32[rows, labels]. What may run together is said by ``sharing``."""
        inputs = padded(rows)
        with span("onnx classifier", {"concord.classifier": self.name, "concord.tokens": inputs["input_ids"].size}):
            logits: FloatArray = self.session.run(["logits"], inputs)[0]
        return logits

    def probabilities(self, rows: Rows) -> FloatArray:
        """Returns calibrated probabilities, float32[rows, labels]; each row is computed by itself."""
        return np.stack([_softmax(logits / np.float32(self.spec.temperature)) for logits in self.logits(rows)])


def _softmax(logits: FloatArray) -> FloatArray:
    shares = np.exp(logits - logits.max())
    return np.asarray(shares / shares.sum(), np.float32)


def load_classifier(
    folder: Path, manifest: Manifest, name: str, *, provider: str, threads: int, tokenizers: Tokenizers
) -> LoadedClassifier:
    """Opens a classifier of a bundle folder whose checksums have been verified.

    Raises:
        BundleError: it does not compute what it computed where it was exported, or other than one logit a label.
        UnavailableError: CUDA was demanded and is not there.
    """
    spec, files = manifest.classifiers[name], classifier_files(name)
    reads_with = files.tokenizer if spec.own_tokenizer else TOKENIZER
    tokenizer = tokenizers.open(folder / reads_with, manifest.files[reads_with])
    session = open_session(folder / files.graph, provider=provider, threads=threads)
    classifier = LoadedClassifier(name, spec, session, tokenizer)
    golden = np.load(folder / files.golden)
    if golden["logits"].shape[1:] != (len(spec.labels),):
        raise BundleError(f"{manifest.model_version}: {files.graph} does not give one logit for each of {len(spec.labels)} labels")
    for ids, length, expected in zip(golden["input_ids"], golden["lengths"], golden["logits"], strict=True):
        compare_golden(manifest.model_version, files.graph, classifier.logits([ids[:length].tolist()])[0], expected)
    claim = claimed(spec.invariance, provider=provider_of(session))
    found = proved(claim, classifier.logits, vocabulary=tokenizer.get_vocab_size())
    if found is not claim:
        _log.warning("a classifier depends on its batch here", classifier=name, claimed=claim.value, proved=found.value)
    return LoadedClassifier(name, spec, session, tokenizer, found)

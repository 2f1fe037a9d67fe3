"""`concord train intent`: utterances → classifier → a folder that `concord export` puts into the bundle."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from features.bundle import Classifier
from features.settings import Settings
from training.classifier_export import write_classifier
from training.config import TrainConfig
from training.intent import train_intents
from training.run import prepare_torch
from training.utterances import Utterances

NAME = "intent"
_GOLDEN = 8


@dataclass(frozen=True)
class IntentResult:
    """A finished training: its folder, what the bundle will say of it, and wall-clock seconds."""

    folder: Path
    classifier: Classifier
    seconds: float


def train_intent(
    settings: Settings,
    utterances: Utterances,
    strangers: Sequence[str] = (),
    *,
    config: TrainConfig,
    examples: int = 100,
    int4: bool = False,
    now: datetime | None = None,
) -> IntentResult:
    """Trains the shop's intent classifier; its folder is ``<data_dir>/classifiers/intent/<time>``.

    Args:
        settings: the shop.
        utterances: labelled, of at least two intents.
        strangers: texts that are out of scope, beside those labelled so.
        config: as ``training.intent.train_intents`` reads it.
        examples: utterances of an intent that are fine-tuned on at the most.
        int4: keep the weights in 4 bits.
        now: names the folder; by default the time of the call.

    Raises:
        ParityError: ONNX Runtime does not reproduce the classifier.
        RefusedVariantError: the batch changes what it computes with weights of 4 bits.
    """
    started = time.monotonic()
    prepare_torch(config)
    trained = train_intents(utterances, strangers, config=config, examples=examples)
    folder = settings.classifiers_dir / NAME / f"{now or datetime.now(UTC):%Y%m%dT%H%M%S}"
    by_length = sorted(set(utterances.texts), key=lambda text: (len(text), text))
    classifier = write_classifier(folder, NAME, trained, by_length[:: max(len(by_length) // _GOLDEN, 1)][:_GOLDEN], int4=int4)
    return IntentResult(folder, classifier, time.monotonic() - started)

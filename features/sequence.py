"""The behaviour sequence as numbers: what the ``sequence`` user tower reads. Shared by training and serving.

A gap counts from the behaviour before, not from now: so what stands at one place depends on earlier behaviours only, and the same
versions give the same input whenever it is made.
"""

import bisect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from features.behaviour import ACTIONS, ACTIVITY_LENGTH, LIKED_FROM, WRITTEN, Activity, Behaviour
from features.item_table import FloatArray
from features.retrieval import VectorArray

Ids = npt.NDArray[np.int64]

# 1 minute to half a year, each about three times the one before: gaps between behaviours spread over eight orders of magnitude.
GAP_SECONDS = (60, 180, 600, 1_800, 7_200, 21_600, 86_400, 259_200, 604_800, 1_209_600, 2_592_000, 5_184_000, 15_552_000)
_MICROS_PER_SECOND = 1_000_000

# Inputs of the graph ``tower.onnx``, in order.
TOWER_INPUTS = ("vectors", "actions", "channels", "gaps", "length")


class SequenceSpec(BaseModel):
    """How behaviours become numbers. It travels in the manifest, so that a server does what the training did.

    Attributes:
        length: behaviours read at the most, the newest; also the fixed length of the graph's input.
        text_count: searches, messages and reviews read at the most, the newest: each costs the server a run of the text encoder.
        actions, channels: names of the ids 1, 2, …; every other name has the id 0.
        gap_seconds: ascending; the id of a gap is 1 + how many of these it reaches, that of the oldest behaviour read is 0.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    length: int = Field(ACTIVITY_LENGTH, ge=1, le=ACTIVITY_LENGTH)
    text_count: int = Field(8, ge=0)
    actions: tuple[str, ...] = ACTIONS
    channels: tuple[str, ...] = ()
    gap_seconds: tuple[int, ...] = GAP_SECONDS

    def gap_id(self, micros: int) -> int:
        """Returns the id of the time from one behaviour to the next, in microseconds."""
        return 1 + bisect.bisect_right(self.gap_seconds, micros / _MICROS_PER_SECOND)


@dataclass(frozen=True)
class BehaviourSequence:
    """Behaviours as numbers, oldest first, n of them.

    Attributes:
        rows: each behaviour's row in the item table, -1 for a search, a message or the words of a review.
        texts: what was searched or written, empty for behaviours on an item.
        actions, channels, gaps: int64[n], ids by the SequenceSpec.
        places: int64[n], which behaviour of the activity each is (0 is the newest): some of them cannot be read and are left out.
    """

    rows: Ids
    texts: tuple[str, ...]
    actions: Ids
    channels: Ids
    gaps: Ids
    places: Ids

    def __len__(self) -> int:
        return len(self.rows)

    def vectors(self, item_vectors: VectorArray, encode: Callable[[str], FloatArray]) -> FloatArray:
        """Returns float32[n, d]: the vector of each behaviour's item, or of its text.

        Args:
            item_vectors: float32[items, d] or float16[items, d], by row of the item table.
            encode: text to its vector in the space of the items, float32[d].
        """
        gathered = np.zeros((len(self), item_vectors.shape[1]), np.float32)
        for place, (row, text) in enumerate(zip(self.rows.tolist(), self.texts, strict=True)):
            gathered[place] = encode(text) if row < 0 else item_vectors[row]
        return gathered


def behaviour_sequence(activity: Activity, rows: Mapping[str, int], spec: SequenceSpec) -> BehaviourSequence:
    """Writes an activity out as numbers.

    A review, or a message about an item, is that item and then its words. A rating below ``LIKED_FROM`` makes another action of
    ``rate`` and ``review``, so that the tower can tell praise from complaint. Items that ``rows`` does not know are left out, and so
    are texts that are empty or beyond ``text_count``.

    Args:
        activity: the customer's behaviours.
        rows: item id to row in the item table.
        spec: the tower's.
    """
    kept: list[tuple[int, int, str]] = []  # newest first: the behaviour's place, its item's row or -1, its words or none
    texts = 0
    for place, behaviour in enumerate(activity.behaviours):
        words = "" if behaviour.item_id and behaviour.action not in WRITTEN else behaviour.words
        if words and texts < spec.text_count and (not behaviour.item_id or behaviour.item_id in rows):
            kept.append((place, -1, words))
            texts += 1
        if behaviour.item_id in rows:
            kept.append((place, rows[behaviour.item_id], ""))
        if len(kept) >= spec.length:
            break
    kept = kept[: spec.length][::-1]
    actions, channels = (_ids(names) for names in (spec.actions, spec.channels))
    read = [activity.behaviours[place] for place, _, _ in kept]
    times = [behaviour.occurred_at for behaviour in read]
    return BehaviourSequence(
        rows=np.array([row for _, row, _ in kept], np.int64),
        texts=tuple(words for _, _, words in kept),
        actions=np.array([actions.get(action_read(behaviour), 0) for behaviour in read], np.int64),
        channels=np.array([channels.get(behaviour.channel, 0) for behaviour in read], np.int64),
        gaps=np.array([0, *(spec.gap_id(b - a) for a, b in itertools.pairwise(times))][: len(kept)], np.int64),
        places=np.array([place for place, _, _ in kept], np.int64),
    )


def action_read(behaviour: Behaviour) -> str:
    """Returns the name that ``SequenceSpec.actions`` has for what was done: ``rate_low`` and ``review_low`` below ``LIKED_FROM``."""
    rating = behaviour.rating
    return behaviour.action if rating is None or rating >= LIKED_FROM else f"{behaviour.action}_low"


def tower_inputs(sequence: BehaviourSequence, vectors: FloatArray, spec: SequenceSpec) -> dict[str, npt.NDArray[np.generic]]:
    """Returns the inputs of ``tower.onnx``, of one fixed shape, which keeps its arithmetic equal to the bit.

    Args:
        sequence: n behaviours.
        vectors: float32[n, d], of ``BehaviourSequence.vectors``.
        spec: the tower's; l is its length.

    Returns:
        ``vectors`` float32[1, l, d]; ``actions``, ``channels`` and ``gaps`` int64[1, l]; ``length`` int64[1], which is n. The newest
        behaviour comes last; what precedes the oldest is zero and never read.
    """
    begin = spec.length - len(sequence)
    padded = np.zeros((1, spec.length, vectors.shape[1]), np.float32)
    padded[0, begin:] = vectors
    ids = np.zeros((3, 1, spec.length), np.int64)
    ids[:, 0, begin:] = (sequence.actions, sequence.channels, sequence.gaps)
    return dict(zip(TOWER_INPUTS, (padded, *ids, np.array([len(sequence)], np.int64)), strict=True))


def _ids(names: tuple[str, ...]) -> dict[str, int]:
    return {name: number for number, name in enumerate(names, start=1)}

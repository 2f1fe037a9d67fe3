"""Active learning: which unlabelled pairs to label next, so that the click classifier gains most from few labels."""

from collections.abc import Callable
from enum import StrEnum

import numpy as np
import numpy.typing as npt
from scipy.cluster.vq import kmeans2

from features.item_table import FloatArray
from training.progress import quiet

Rows = npt.NDArray[np.int64]
# Candidates per label that the clusters are made of: the most uncertain ones only.
_UNCERTAIN_PER_LABEL = 10


class Strategy(StrEnum):
    """How to choose. Entropy and margin choose alike where there are two classes; the others also spread the choice."""

    RANDOM = "random"
    ENTROPY = "entropy"
    MARGIN = "margin"
    CLUSTER = "cluster"
    K_CENTER = "k_center"
    BADGE = "badge"


def choose(
    strategy: Strategy, probabilities: FloatArray, embeddings: FloatArray, *, count: int, labelled: FloatArray, rng: np.random.Generator
) -> Rows:
    """Returns the rows of the pool to label next, at most ``count``, each once, most useful first where the strategy orders them.

    Args:
        strategy: how to choose.
        probabilities: float[n, c], the model's class probabilities of the unlabelled pool.
        embeddings: float[n, h], what the model's last layer reads of it.
        count: labels that can be paid for.
        labelled: float[m, h], embeddings of what is labelled already; only K_CENTER looks at them.
        rng: of every random choice.
    """
    count = min(count, len(probabilities))
    if not count:
        return np.zeros(0, np.int64)
    rules: dict[Strategy, Callable[[], Rows]] = {
        Strategy.RANDOM: lambda: rng.choice(len(probabilities), count, replace=False),
        Strategy.ENTROPY: lambda: np.argsort(-entropy(probabilities), kind="stable")[:count],
        Strategy.MARGIN: lambda: np.argsort(margin(probabilities), kind="stable")[:count],
        Strategy.CLUSTER: lambda: clustered(probabilities, embeddings, count=count, rng=rng),
        Strategy.K_CENTER: lambda: k_center(embeddings, labelled, count=count),
        Strategy.BADGE: lambda: badge(probabilities, embeddings, count=count, rng=rng),
    }
    return np.asarray(rules[strategy](), np.int64)


def entropy(probabilities: FloatArray) -> FloatArray:
    """Returns the entropy of each row in nats."""
    clipped = np.clip(probabilities, 1e-12, 1.0)
    return np.asarray(-(clipped * np.log(clipped)).sum(1), probabilities.dtype)


def margin(probabilities: FloatArray) -> FloatArray:
    """Returns how far the best class is ahead of the second, per row."""
    best = np.sort(probabilities, axis=1)
    return np.asarray(best[:, -1] - best[:, -2], probabilities.dtype)


def clustered(probabilities: FloatArray, embeddings: FloatArray, *, count: int, rng: np.random.Generator) -> Rows:
    """Returns the most uncertain row of each of ``count`` k-means clusters of the most uncertain rows (Zhdanov, 2019)."""
    doubt = entropy(probabilities)
    pool = np.argsort(-doubt, kind="stable")[: count * _UNCERTAIN_PER_LABEL]
    with quiet():  # an empty cluster is no defect here
        _, cluster = kmeans2(embeddings[pool].astype(np.float64), count, minit="++", rng=rng)
    _, first = np.unique(cluster, return_index=True)  # the pool is ordered, so the first of a cluster is its most uncertain
    chosen = np.sort(first)
    rest = np.setdiff1d(np.arange(len(pool)), chosen)[: count - len(chosen)]  # for clusters that ended empty
    return np.asarray(pool[np.concatenate([chosen, rest])], np.int64)


def k_center(embeddings: FloatArray, labelled: FloatArray, *, count: int) -> Rows:
    """Returns rows each farthest from all that is labelled or chosen before it (Sener & Savarese, ICLR 2018)."""
    centres = labelled if len(labelled) else embeddings.mean(0, keepdims=True)
    distance = np.full(len(embeddings), np.inf)
    for centre in centres:
        distance = np.minimum(distance, _squared(embeddings, centre))
    chosen: list[int] = []
    for _ in range(count):
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, _squared(embeddings, embeddings[chosen[-1]]))
        distance[chosen] = -1.0
    return np.array(chosen, np.int64)


def badge(probabilities: FloatArray, embeddings: FloatArray, *, count: int, rng: np.random.Generator) -> Rows:
    """Returns rows by k-means++ over the gradients of the last layer, were the model's own guess the label (Ash et al., ICLR 2020).

    A gradient is long where the model is unsure, and two point alike where the pairs do: both doubt and variety count.
    """
    guess = np.eye(probabilities.shape[1])[probabilities.argmax(1)]
    gradients = ((probabilities - guess)[:, :, None] * embeddings[:, None, :]).reshape(len(probabilities), -1)
    chosen = [int((gradients**2).sum(1).argmax())]
    distance = _squared(gradients, gradients[chosen[0]])
    while len(chosen) < count:
        distance[chosen] = 0.0
        weight = distance.sum()
        left = np.setdiff1d(np.arange(len(gradients)), chosen)
        chosen.append(int(rng.choice(len(gradients), p=distance / weight) if weight > 0 else rng.choice(left)))
        distance = np.minimum(distance, _squared(gradients, gradients[chosen[-1]]))
    return np.array(chosen, np.int64)


def _squared(points: "npt.NDArray[np.floating]", centre: "npt.NDArray[np.floating]") -> "npt.NDArray[np.float64]":
    return np.asarray(((points - centre) ** 2).sum(1), np.float64)

"""Candidate retrieval from large catalogues: the index beside an exact scan, usearch, and what memory can read at the most.

    CONCORD_TEST_DATA=../shared/data python bench/candidates.py --items 10000 100000 1000000

Vectors: titles by the packaged MiniLM (of the Amazon Beauty set where CONCORD_TEST_DATA names it, else of the sample shop), grown to
the catalogue's size: each further item is a title's vector moved by the difference of another title from one of its ten nearest, so
that families of like items and the spectrum of real titles remain. Customers: MiniLM vectors of four titles written as a behaviour
text. Exact is what scans fp32 vectors; an item counts as found if its exact score is at least that of the hundredth. usearch takes
minutes to build for 1 M items and is asked up to ``--peer-items``. Below 20,000 items the server scans, as "einsum" does here. All
are asked one query at a time, on one thread, in turn; ours then four times as often again, for of 200 queries the 99th percentile is
the second worst. The peer in the line of JSON is the exact scan by BLAS at the largest size,
the limit what reading its fp32 vectors once would take.
"""

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from subprocess import PIPE, Popen
from tempfile import TemporaryDirectory
from time import perf_counter, process_time

import numpy as np
from rich.table import Table
from threadpoolctl import threadpool_limits

from features.item_table import FloatArray, IntArray
from features.retrieval import INDEXED_FROM, VectorArray, VectorIndex, all_scores, vector_scores
from features.sample_shop import generate
from harness import WORK, Verdict, console, in_turn, peer_python, percentile
from training.encode import pretrained_vectors

_DEEP = 100
_TITLES, _QUERIES, _MORE = 4_000, 200, 4
_LIMIT_MS, _LIMIT_BYTES, _LIMIT_RECALL = 5.0, 1_024, 0.95
_USEARCH = """
import sys, time, numpy as np
from usearch.index import Index
folder, threads = sys.argv[1], int(sys.argv[2])
vectors, queries = (np.load(f"{folder}/{name}.npy") for name in ("vectors", "queries"))
kept = vectors.astype(np.float16)
index = Index(ndim=vectors.shape[1], metric="ip", dtype="i8", connectivity=16, expansion_add=128, expansion_search=256)
started = time.perf_counter()
index.add(np.arange(len(vectors)), vectors, threads=threads)
print(time.perf_counter() - started, index.memory_usage / len(vectors), flush=True)
for line in sys.stdin:
    query = queries[int(line)]
    started = time.perf_counter()
    rows = index.search(query, 500, threads=1).keys.astype(np.int64)
    scores = np.einsum("nd,d->n", kept[rows].astype(np.float32), query)
    best = rows[np.lexsort((rows, -scores))[:100]]
    print(time.perf_counter() - started, *best, flush=True)
"""


@dataclass
class Contender:
    """One way to the nearest hundred: seconds of each answer, what it found of each query, its size and its making."""

    bytes_per_item: float
    build_seconds: float
    seconds: list[float] = field(default_factory=list)
    found: dict[int, IntArray] = field(default_factory=dict)

    def p(self, share: float) -> float:
        """Returns milliseconds."""
        return percentile(self.seconds, share) * 1e3


def titles(data: str | None) -> list[str]:
    """Returns distinct titles of real products, in an order of no meaning."""
    path = Path(data or "") / "amazon_beauty_items.parquet"
    if data and path.is_file():
        import pandas as pd

        names = set(pd.read_parquet(path)["title"].dropna().astype(str))
    else:
        names = {item.title for item in generate(7, end=datetime(2026, 1, 1, tzinfo=UTC), users=1, items=_TITLES).items}
    return [str(name) for name in np.random.default_rng(0).permutation(sorted(names))[:_TITLES]]


def encoded(names: Sequence[str]) -> tuple[FloatArray, FloatArray]:
    """Returns unit vectors of titles and of customers, kept from one run to the next."""
    kept = WORK / f"title_vectors_{len(names)}_{sum(map(len, names))}.npz"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        vectors, rng = pretrained_vectors(names), np.random.default_rng(1)
        texts = []
        for row in rng.integers(0, len(names), _QUERIES):
            alike = np.argsort(-(vectors @ vectors[row]))[1:60]
            a, b, c = names[row], names[rng.choice(alike)], names[rng.choice(alike)]
            texts.append(f"viewed {a}; added {b}; viewed {c}; bought {names[rng.integers(len(names))]}")
        np.savez(kept, titles=vectors, customers=pretrained_vectors(texts, tokens=128))
    arrays = np.load(kept)
    return arrays["titles"], arrays["customers"]


def grown(base: FloatArray, count: int) -> FloatArray:
    """Returns float32[count, d]: the titles' vectors and, of some families more than of others, variations of them."""
    rng = np.random.default_rng(2)
    near = np.argpartition(-(base @ base.T), range(1, 11), axis=1)[:, 1:11]
    vectors = np.empty((count, base.shape[1]), np.float32)
    vectors[: len(base)] = base[:count]
    for begin in range(min(len(base), count), count, 50_000):
        number = min(50_000, count - begin)
        family = (len(base) * rng.random(number) ** 2).astype(np.int64)
        other = rng.integers(0, len(base), number)
        made = base[family] + base[other] - base[near[other, rng.integers(0, 10, number)]]
        vectors[begin : begin + number] = made / np.linalg.norm(made, axis=1, keepdims=True)
    return vectors


@contextmanager
def usearch(vectors: FloatArray, queries: FloatArray, threads: int) -> Iterator[tuple[Contender, Callable[[int], None]]]:
    """Yields the peer, built, and how to ask it; it times itself, so that the pipe to it does not count."""
    with TemporaryDirectory() as folder:
        for name, array in (("vectors", vectors), ("queries", queries)):
            np.save(f"{folder}/{name}.npy", array)
        python = peer_python("usearch", "usearch==2.26.6", "numpy")
        with Popen([str(python), "-c", _USEARCH, folder, str(threads)], stdin=PIPE, stdout=PIPE, text=True) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            seconds, size = map(float, process.stdout.readline().split())
            peer = Contender(size + 2 * vectors.shape[1], seconds)

            def ask(number: int) -> None:
                print(number, file=process.stdin, flush=True)
                taken, *rows = process.stdout.readline().split()  # type: ignore[union-attr]
                peer.seconds.append(float(taken))
                peer.found[number] = np.array(rows, np.int64)

            yield peer, ask
            process.stdin.close()


def best_of(scores: FloatArray, rows: IntArray | None = None) -> IntArray:
    """Returns the rows of the hundred best scores, in order."""
    top = np.argpartition(-scores, _DEEP)[:_DEEP]
    top = top[np.argsort(-scores[top], kind="stable")]
    return top if rows is None else rows[top]


def compare(vectors: FloatArray, queries: FloatArray, peer_items: int) -> dict[str, Contender]:
    """Builds all, asks all in turn, and returns how each did."""
    count, size = vectors.shape
    kept: VectorArray = vectors.astype(np.float16)
    started, worked = perf_counter(), process_time()
    index = VectorIndex(kept)
    console.print(f"[dim]{count:,} items: index built in {perf_counter() - started:.1f} s, {process_time() - worked:.1f} s of a core[/dim]")
    import faiss

    ours = Contender(2 * size + len(faiss.serialize_index(index._lists)) / count, perf_counter() - started)
    exact, scan = Contender(4 * size, 0.0), Contender(4 * size, 0.0)
    numbers = {name: iter(range(10**6)) for name in ("index", "exact", "scan", "usearch")}

    def ask(name: str, who: Contender, answer: Callable[[FloatArray], IntArray]) -> Callable[[], None]:
        def once() -> None:
            number = next(numbers[name]) % len(queries)
            started = perf_counter()
            rows = answer(queries[number])
            who.seconds.append(perf_counter() - started)
            who.found[number] = rows

        return once

    def by_index(query: FloatArray) -> IntArray:
        scores = vector_scores(kept, query, index)
        return best_of(scores.values, scores.rows)

    questions = {
        "index": ask("index", ours, by_index),
        "exact": ask("exact", exact, lambda query: best_of(vectors @ query)),
        "scan": ask("scan", scan, lambda query: best_of(all_scores(vectors, query).values)),
    }
    contenders = {"ours: index + exact scores": ours, "exact, BLAS": exact, "exact, einsum (small catalogues)": scan}
    rounds = len(queries)
    with threadpool_limits(1):
        if count <= peer_items:
            with usearch(vectors, queries, os.cpu_count() or 1) as (peer, ask_peer):
                questions["usearch"] = lambda: ask_peer(next(numbers["usearch"]) % len(queries))
                contenders["usearch HNSW int8 + exact scores"] = peer
                in_turn(questions, rounds=rounds, warm_up=len(questions))
        else:
            in_turn(questions, rounds=rounds, warm_up=len(questions))
        for one in contenders.values():
            one.seconds = one.seconds[-rounds:]
        for _ in range(_MORE * rounds):
            questions["index"]()
    return contenders


def recall(one: Contender, exact: Contender, vectors: FloatArray, queries: FloatArray) -> float:
    """Returns the share of the exact hundred that was found; equal scores are equally good."""
    hits = []
    for number, rows in one.found.items():
        least = (vectors[exact.found[number]] @ queries[number]).min() - 1e-6
        hits.append(np.count_nonzero(vectors[rows] @ queries[number] >= least) / _DEEP)
    return float(np.mean(hits))


def read_rate() -> float:
    """Returns the bytes a second that one thread reads from memory."""
    block = np.ones(1 << 26, np.uint64)
    times = in_turn({"read": lambda: np.bitwise_or.reduce(block)}, rounds=7)["read"]
    return block.nbytes / min(times)


def main() -> None:
    """Runs the benchmark and prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="catalogue sizes, ascending")
    parser.add_argument("--peer-items", type=int, default=100_000, help="usearch is built for catalogues up to this size")
    parser.add_argument("--data", default=os.environ.get("CONCORD_TEST_DATA"), help="folder of the real data sets")
    options = parser.parse_args()
    base, queries = encoded(titles(options.data))
    rate, met, more = read_rate(), True, {}
    table = Table("items", "way", "recall@100", "p50 ms", "p99 ms", "bytes/item", "build s")
    for count in options.items:
        vectors = grown(base, count)
        found = compare(vectors, queries, options.peer_items)
        ours, exact = found["ours: index + exact scores"], found["exact, BLAS"]
        for name, one in found.items():
            share = recall(one, exact, vectors, queries)
            figures = (f"{share:.4f}", f"{one.p(0.5):.2f}", f"{one.p(0.99):.2f}", f"{one.bytes_per_item:.0f}", f"{one.build_seconds:.1f}")
            table.add_row(f"{count:,}", name, *figures)
            if one is (ours if count >= INDEXED_FROM else found["exact, einsum (small catalogues)"]):
                met &= share >= _LIMIT_RECALL and one.p(0.99) <= _LIMIT_MS
                met &= count < INDEXED_FROM or one.bytes_per_item <= _LIMIT_BYTES
            if one is ours:
                more |= {f"recall_{count}": share, f"p50_ms_{count}": one.p(0.5), f"p99_ms_{count}": one.p(0.99)}
                more |= {f"bytes_{count}": one.bytes_per_item, f"build_s_{count}": one.build_seconds}
            elif name.startswith("usearch"):
                more |= {f"usearch_p50_ms_{count}": one.p(0.5), f"usearch_recall_{count}": share}
        more[f"scan_p50_ms_{count}"] = found["exact, einsum (small catalogues)"].p(0.5)
    console.print(table)
    limit = vectors.nbytes / rate * 1e3
    console.print(f"one thread reads {rate / 1e9:.1f} GB/s: an exact scan of {count:,} items takes {limit:.1f} ms at the least")
    print(Verdict("candidates", ours.p(0.5), exact.p(0.5), limit, "ms", met).line(items=count, **more))


if __name__ == "__main__":
    main()

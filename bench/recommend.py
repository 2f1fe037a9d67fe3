"""`Recommend` with its slate committed: calls a second of one process, and the 99th percentile at half that load.

    python bench/recommend.py

Side by side: a bare grpc.aio echo on uvloop that returns the bytes of the same answer (the limit: what gRPC itself costs in Python),
and Feast's own feature server fetching 21 of the same customers' features over HTTP (the peer: what others give before any model is
asked). They take turns, round by round. Calls come from ``http2_load.py``, a process of its own; its share of a core is shown, for
one near 1 would make the load the bottleneck. Bars: at least half of the echo's rate, at most twice its p99 at the same calls a
second (half of what ours can), and three times the peer's rate.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import grpc
from rich.table import Table

from cli.stack import running_server
from concord.v1 import recommendation_pb2
from feast_http import body, feature_server
from harness import WORK, Verdict, console, loaded, prepared_shop
from overload import RECOMMEND, requests

_ECHO = Path(__file__).with_name("echo.py")


@contextmanager
def echo(answer: bytes) -> Iterator[str]:
    """Runs the echo server; yields its address."""
    process = subprocess.Popen([sys.executable, str(_ECHO)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(answer.hex() + "\n")
        process.stdin.flush()
        yield f"127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.terminate()
        process.wait(10)


def load(address: str, messages: Sequence[bytes], seconds: float, *kind: str) -> dict[str, float]:
    """Returns the figures of a load of a kind, of which the first second does not count."""
    return loaded("http2_load.py", address, RECOMMEND, messages, "--seconds", str(seconds), "--warm-up", "1", *kind)


def warmed(address: str, messages: Sequence[bytes]) -> bytes:
    """Asks once for every customer, so that their slates are committed; returns one answer."""
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(RECOMMEND)
        answers = [call(message, timeout=20) for message in messages]
    if not recommendation_pb2.RecommendResponse.FromString(answers[0]).items:
        raise RuntimeError("the server shows nothing")
    found: bytes = answers[0]
    return found


def middle(found: Sequence[Mapping[str, float]], figure: str) -> float:
    """Returns the median of a figure over the rounds."""
    return median(one[figure] for one in found)


def by_round(found: Mapping[str, Sequence[Mapping[str, float]]], figure: str) -> list[float]:
    """Returns ours over the echo's, round by round: both of a round met the same machine."""
    return [ours[figure] / bare[figure] for ours, bare in zip(found["ours"], found["echo"], strict=True)]


def main() -> None:
    """Runs the benchmark and prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    options = parser.parse_args()
    peaks: dict[str, list[dict[str, float]]] = {"ours": [], "echo": []}
    halves: dict[str, list[dict[str, float]]] = {"ours": [], "echo": []}
    peer: list[float] = []
    with prepared_shop() as settings, running_server(WORK) as ports, feature_server(settings) as feast:
        messages = requests(settings.postgres_dsn)
        asked = [body([recommendation_pb2.RecommendRequest.FromString(message).subject.user_id]) for message in messages]
        address = f"127.0.0.1:{ports['port']}"
        with echo(warmed(address, messages)) as limit:
            addresses = {"ours": address, "echo": limit}
            for number in range(options.rounds):
                for name in sorted(addresses, reverse=number % 2 == 0):
                    peaks[name].append(load(addresses[name], messages, options.seconds, "--outstanding", "32"))
                words = ("--connections", "16", "--warm-up", "1", "--seconds", str(options.seconds))
                found = loaded("http1_load.py", f"127.0.0.1:{feast}", "/get-online-features", asked, *words)
                peer.append(found["answered_per_second"])
                rate = peaks["ours"][-1]["answered_per_second"] / 2
                for name in sorted(addresses, reverse=number % 2 == 0):
                    halves[name].append(load(addresses[name], messages, options.seconds, "--rate", str(rate), "--prompt"))
    rates = {name: middle(found, "answered_per_second") for name, found in peaks.items()}
    share = median(by_round(peaks, "answered_per_second"))
    slower = median(by_round(halves, "answer_ms_p99"))
    rows = Table("", "calls/s", "p50 ms at half load", "p99 ms", "load's share of a core", title="Recommend, slate committed, one process")
    for name in addresses:
        p50, p99, busy = middle(halves[name], "answer_ms_p50"), middle(halves[name], "answer_ms_p99"), middle(peaks[name], "cpu_share")
        rows.add_row(name, f"{rates[name]:,.0f}", f"{p50:.2f}", f"{p99:.2f}", f"{busy:.2f}")
    rows.add_row("Feast's feature server, 21 features", f"{median(peer):,.0f}", "", "", "")
    console.print(rows)
    met = share >= 0.5 and slower <= 2 and rates["ours"] >= 3 * median(peer)
    verdict = Verdict("recommend", rates["ours"], median(peer), rates["echo"], "calls/s", met, lower_is_better=False)
    print(verdict.line(share_of_echo=share, p99_times_echo=slower, p99_ms=middle(halves["ours"], "answer_ms_p99")))


if __name__ == "__main__":
    main()

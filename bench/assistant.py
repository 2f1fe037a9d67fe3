"""`Ask`: questions of five kinds, each a new message that is recorded, answered and committed, at a fixed rate.

    python bench/assistant.py

200 customers with a history ask in turn: an article (of 500), a price, their own orders, something like an item, and something that
nothing answers. Calls come at a fixed rate from ``http2_load.py``, a process of its own, whether or not the answers keep up. There is
no peer to measure beside: what a chat costs elsewhere is a language model's seconds. The bar is our own: 100 ms at the 99th
percentile of every kind, at 20 questions a second on two cores.
"""

import argparse
from collections.abc import Sequence
from itertools import cycle, islice

import grpc
import psycopg
from rich.table import Table

from cli.stack import running_server
from concord.v1 import assistant_pb2, common_pb2
from features.articles import Article, upsert_articles
from features.settings import Settings
from harness import WORK, Verdict, console, loaded, prepared_shop, returning_customers

_PATH = "/concord.v1.AssistantService/Ask"
_CUSTOMERS, _ARTICLES, _BAR = 200, 500, 100.0
_TOPICS = ("returns", "shipping", "payment", "gift cards", "sizes", "warranty", "repairs", "newsletters", "invoices", "pickup")


def fill(settings: Settings) -> None:
    """Stores the articles."""
    articles = [
        Article(f"bench-{k}", f"What about {_TOPICS[k % 10]} of kind {k}?", f"For {_TOPICS[k % 10]} of kind {k} we need {k % 9 + 1} days.")
        for k in range(_ARTICLES)
    ]
    with psycopg.connect(settings.postgres_dsn) as connection:
        upsert_articles(connection, articles)


def questions(settings: Settings) -> dict[str, list[str]]:
    """Returns questions by kind, more different ones than a server remembers vectors of in a round."""
    with psycopg.connect(settings.postgres_dsn) as connection:
        titles = [row[0] for row in connection.execute("SELECT title FROM items WHERE NOT removed ORDER BY item_id LIMIT 300")]
    return {
        "article": [f"what about {_TOPICS[k % 10]} of kind {k}?" for k in range(300)],
        "price": [f"how much is the {title}?" for title in titles],
        "orders": ["what did I buy last?"],
        "suggestions": [f"something like the {title} under 50" for title in titles],
        "handover": [f"who won the cup in {1900 + k}?" for k in range(100)],
    }


def requests(customers: Sequence[str], texts: Sequence[str]) -> list[bytes]:
    """Returns a message of each customer, the texts in turn."""
    pairs = zip(customers, islice(cycle(texts), len(customers)), strict=True)
    return [
        assistant_pb2.AskRequest(subject=common_pb2.Subject(user_id=customer), channel="web", text=text).SerializeToString()
        for customer, text in pairs
    ]


def main() -> None:
    """Runs the benchmark and prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=20.0, help="questions a second")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each kind")
    options = parser.parse_args()
    found = {}
    with prepared_shop() as settings:
        fill(settings)
        with running_server(WORK) as ports:
            address, customers = f"127.0.0.1:{ports['port']}", returning_customers(settings, _CUSTOMERS)
            with grpc.insecure_channel(address) as channel:  # waits until the new articles are encoded, once for the fleet
                channel.unary_unary(_PATH)(requests(customers[:1], ["hello"])[0], timeout=120)
            words = ("--rate", str(options.rate), "--prompt", "--seconds", str(options.seconds), "--warm-up", "3")
            for kind, texts in questions(settings).items():
                found[kind] = loaded("http2_load.py", address, _PATH, requests(customers, texts), *words)
    table = Table("kind", "questions/s", "p50 ms", "p99 ms", "answered", title=f"Ask, {_ARTICLES} articles")
    for kind, figures in found.items():
        times = (f"{figures['answer_ms_p50']:.1f}", f"{figures['answer_ms_p99']:.1f}")
        table.add_row(kind, f"{options.rate:.0f}", *times, f"{figures['answered_per_second'] / options.rate:.0%}")
    console.print(table)
    worst = max(figures["answer_ms_p99"] for figures in found.values())
    met = worst <= _BAR and all(figures["answered_per_second"] >= 0.99 * options.rate for figures in found.values())
    more = {f"{kind}_{name}": figures[f"answer_ms_{name}"] for kind, figures in found.items() for name in ("p50", "p99")}
    print(Verdict("assistant", worst, None, _BAR, "ms, p99", met).line(**more))


if __name__ == "__main__":
    main()

"""What workers share: a port that is theirs alone, and one endpoint that tells their metrics apart."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from features.settings import SettingsError
from server.listening import shared_port
from server.metrics import serve_metrics
from server.workers.metrics import WorkerMetrics

HOST = "127.0.0.1"


@contextmanager
def listening(port: int, *, shares: bool) -> Iterator[socket.socket]:
    """Listens as gRPC does: with SO_REUSEADDR, and with SO_REUSEPORT where it shares."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(shares))
        sock.bind((HOST, port))
        sock.listen()
        yield sock


def refused(port: int, host: str = HOST) -> str:
    """Returns why a port is not shared out."""
    with pytest.raises(SettingsError) as error, shared_port(host, port, setting="CONCORD_PORT"):
        pass
    return str(error.value)


def test_workers_listen_on_a_shared_port_and_nobody_else_does() -> None:
    with shared_port(HOST, 0, setting="CONCORD_PORT") as port:
        assert port > 0
        with pytest.raises(OSError, match="in use"), listening(port, shares=False):
            pass
        with (
            pytest.raises(SettingsError, match=f"CONCORD_PORT: cannot listen on {HOST}:{port}"),
            shared_port(HOST, port, setting="CONCORD_PORT"),
        ):
            pass
        with listening(port, shares=True) as one, listening(port, shares=True) as two:
            for sock in (one, two):
                sock.settimeout(0)
            for _ in range(64):  # 2^-63 that one of two gets none
                socket.create_connection((HOST, port), timeout=5).close()
            assert [accepted(sock) > 0 for sock in (one, two)] == [True, True]
            assert "is the port taken?" in refused(port)


def accepted(sock: socket.socket) -> int:
    count = 0
    while True:
        try:
            sock.accept()[0].close()
        except BlockingIOError:
            return count
        count += 1


def test_a_port_that_one_server_holds_by_itself_is_not_shared() -> None:
    with (
        listening(0, shares=False) as alone,
        pytest.raises(SettingsError, match="is the port taken"),
        shared_port(HOST, alone.getsockname()[1], setting="CONCORD_ADMIN_PORT"),
    ):
        pass


def test_a_port_is_free_again_although_connections_to_it_linger() -> None:
    with shared_port(HOST, 0, setting="CONCORD_PORT") as port, listening(port, shares=True) as server:
        client = socket.create_connection((HOST, port), timeout=5)
        served, _ = server.accept()
        served.close()  # who closes first keeps the address in TIME_WAIT
        client.close()
    with shared_port(HOST, port, setting="CONCORD_PORT") as again:
        assert again == port


def test_a_name_of_two_addresses_is_held_on_both() -> None:
    with shared_port("localhost", 0, setting="CONCORD_PORT") as port:
        for family, *_, address in socket.getaddrinfo("localhost", port, type=socket.SOCK_STREAM):
            with socket.socket(family, socket.SOCK_STREAM) as other, pytest.raises(OSError, match="in use"):
                other.bind(address)


def test_what_is_no_address_of_a_network_is_refused() -> None:
    with (
        pytest.raises(SettingsError, match="CONCORD_PORT: unix:/run/concord is no address"),
        shared_port("unix:/run/concord", 0, setting="CONCORD_PORT"),
    ):
        pass


def test_metrics_of_workers_are_told_apart_and_one_that_does_not_answer_is_left_out() -> None:
    ports: dict[int, int] = {}
    whole = CollectorRegistry()
    metrics = WorkerMetrics(whole, lambda: ports)
    metrics.ready.set(2)
    registries = [CollectorRegistry() for _ in range(2)]
    for number, registry in enumerate(registries):
        Counter("concord_things", 'Things, with "quotes".', ["kind"], registry=registry).labels("a\nb").inc(number + 1)
        Histogram("concord_seconds", "Time.", registry=registry).observe(0.2)
    with ExitStack() as stack:
        for number, registry in enumerate(registries):
            endpoint = serve_metrics(registry, HOST, 0)
            stack.callback(endpoint.close)
            ports[number] = endpoint.port
        value = whole.get_sample_value
        assert [value("concord_things_total", {"kind": "a\nb", "worker": str(number)}) for number in (0, 1)] == [1, 2]
        assert value("concord_seconds_bucket", {"le": "0.25", "worker": "1"}) == 1
        assert value("concord_workers_ready") == 2
        text = generate_latest(whole).decode()
        assert text.count("# TYPE concord_things_total counter") == 1
        with socket.socket() as nobody:
            nobody.bind((HOST, 0))
            ports[1] = nobody.getsockname()[1]
            assert value("concord_things_total", {"kind": "a\nb", "worker": "1"}) is None
            assert value("concord_things_total", {"kind": "a\nb", "worker": "0"}) == 1

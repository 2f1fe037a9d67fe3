"""Commands that run a server or call one: serve, health, record, recommend, search."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.table import Table

from cli.context import shop
from cli.credentials import call_settings
from features.settings import Settings
from server.loop import finished

if TYPE_CHECKING:
    from concord import Concord
    from concord.v1.common_pb2 import Money
    from server.listening import Ports

_out = Console()
_Server = Annotated[str, typer.Option(help="Address of a running server.")]
_Channel = Annotated[str, typer.Option(help="Channel the call comes from.")]


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command(epilog="Example: CONCORD_PORT=50051 concord serve")(serve)
    app.command(epilog="Example: concord health --server 127.0.0.1:50051")(health)
    app.command(epilog="Example: concord record alice purchase --item sku-1 --channel store")(record)
    app.command(epilog="Example: concord recommend alice --channel app --surface home --limit 5")(recommend)
    app.command(epilog='Example: concord search alice "enamel mug" --max-price 20EUR --channel app')(search)
    app.command(epilog="Example: concord suggest ena --channel app")(suggest)


def serve(
    ready: Annotated[bool, typer.Option(help="Print one line of JSON with the ports when ready (for programs).")] = False,
    workers: Annotated[int | None, typer.Option(min=1, max=64, help="Processes that share the ports; default: CONCORD_WORKERS.")] = None,
) -> None:
    """Brings schema and Feast repository up to date where they are not, and serves until SIGTERM; prints how to call it."""
    from server.logs import configure
    from server.settings import ServerSettings

    configure()
    with shop(ServerSettings) as settings:
        if workers is not None:
            settings = settings.model_copy(update={"workers": workers})
        bring_up_to_date(settings)

        def announce(ports: "Ports") -> None:
            if ready:
                print(json.dumps(asdict(ports)), flush=True)  # noqa: T201 - read by a program
            else:
                _print_how_to_call(f"{settings.host}:{ports.port}", ports.metrics_port)
                if ports.admin_port != ports.port:
                    _out.print(f"Admin methods are on {settings.admin_host}:{ports.admin_port}", highlight=False)

        if settings.workers > 1:
            from server.workers.supervisor import supervise

            if status := finished(supervise(settings, announce=announce)):
                raise typer.Exit(status if status > 0 else 1)
        else:
            from server.process import serve as run

            finished(run(settings, announce=announce))


def bring_up_to_date(settings: Settings) -> None:
    """Migrates the schema and applies the Feast repository if that would change anything.

    In processes of their own: what Feast imports, 6 s of processor time and 250 MB, would stay in a server for as long as it runs.
    """
    from features.registry import is_applied, load_registry
    from features.schema import current_revision, head_revision

    if current_revision(settings.postgres_dsn) != head_revision():
        _run_command("migrate", settings)
    if not is_applied(load_registry(settings)):
        _run_command("apply", settings)


def _run_command(command: str, settings: Settings) -> None:
    named = {"CONCORD_POSTGRES_DSN": settings.postgres_dsn, "CONCORD_REDIS_URL": settings.redis_url, "CONCORD_PROJECT": settings.project}
    done = subprocess.run([sys.executable, "-m", "cli.main", command], stdout=subprocess.DEVNULL, env=os.environ | named, check=False)
    if done.returncode:  # it has said why
        raise typer.Exit(done.returncode)


def health(server: _Server = "127.0.0.1:50051") -> None:
    """Shows whether a running server, its services and what they depend on are well.

    The exit status is 1 unless the server answers SERVING within 3 seconds; a dependency that is away does not change that.
    """
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    options = [("grpc.enable_http_proxy", 0)]
    credentials = call_settings().channel_credentials()
    with grpc.secure_channel(server, credentials, options) if credentials else grpc.insecure_channel(server, options) as channel:
        try:
            statuses = health_pb2_grpc.HealthStub(channel).List(health_pb2.HealthListRequest(), timeout=3).statuses
        except grpc.RpcError as error:
            _out.print(f"{server}: no answer: {error.code().name}", highlight=False)
            raise typer.Exit(1) from None
    named = {name: health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status) for name, answer in statuses.items()}
    overall = named.pop("", "SERVICE_UNKNOWN")
    _out.print(f"{server}: {overall}", highlight=False)
    for name, status in sorted(named.items()):
        _out.print(f"  {name:<38} {status}", highlight=False)
    if overall != "SERVING":
        raise typer.Exit(1)


def record(
    customer: Annotated[str, typer.Argument(help="The customer's id in the channel.")],
    action: Annotated[str, typer.Argument(help="view, click, search, add_to_cart, purchase, return, rate, review, wishlist, message, ...")],
    item: Annotated[str, typer.Option(help="Item id.")] = "",
    text: Annotated[str, typer.Option(help="Search, review or message text.")] = "",
    channel: _Channel = "web",
    server: _Server = "127.0.0.1:50051",
) -> None:
    """Records one event and prints its result and consistency token."""

    async def call() -> Any:
        async with connected(server, channel) as client:
            return await client.record(client.event(customer, action, item_id=item, text=text))

    _out.print_json(data=MessageToDict(finished(call()), preserving_proto_field_name=True))


def recommend(
    customer: Annotated[str, typer.Argument(help="The customer's id in the channel.")],
    channel: _Channel = "web",
    surface: Annotated[str, typer.Option(help="Where it is shown: home, product, cart, ...")] = "home",
    limit: Annotated[int, typer.Option(help="How many items, 1 to 100.")] = 10,
    server: _Server = "127.0.0.1:50051",
) -> None:
    """Asks for recommendations and prints them with prices, reasons and versions."""

    async def call() -> Any:
        async with connected(server, channel) as client:
            return await client.recommend(customer, surface=surface, limit=limit)

    answer = finished(call())
    _print_items(answer)
    _out.print(f"slate {answer.slate_id}, versions {MessageToDict(answer.versions, preserving_proto_field_name=True)}")


def search(
    customer: Annotated[str, typer.Argument(help="The customer's id in the channel.")],
    query: Annotated[str, typer.Argument(help="What is searched for.")],
    channel: _Channel = "web",
    category: Annotated[list[str] | None, typer.Option(help="Only of this category; may be named several times.")] = None,
    brand: Annotated[list[str] | None, typer.Option(help="Only of this brand; may be named several times.")] = None,
    max_price: Annotated[str, typer.Option(help="At most this price, with its currency: 20EUR or 19.90USD.")] = "",
    limit: Annotated[int, typer.Option(help="How many items, 1 to 100.")] = 10,
    recorded: Annotated[bool, typer.Option("--record/--no-record", help="Record the search as the customer's.")] = False,
    server: _Server = "127.0.0.1:50051",
) -> None:
    """Searches for a customer and prints what is found with prices and reasons, what there is to choose, and versions.

    A look from the command line is nothing that the customer did, so it is not recorded unless that is asked for.
    """
    from concord.v1.recommendation_pb2 import ItemFilter
    from concord.v1.search_pb2 import SearchOutcome

    wanted = ItemFilter(categories=category or (), brands=brand or ())
    if max_price:
        wanted.max_price.CopyFrom(_money(max_price))

    async def call() -> Any:
        async with connected(server, channel) as client:
            return await client.search(customer, query, limit=limit, item_filter=wanted, skip_recording=not recorded)

    answer = finished(call())
    _print_items(answer)
    outcome = SearchOutcome.Name(answer.outcome).removeprefix("SEARCH_OUTCOME_").lower()
    meant = f', searched for "{answer.corrected_query}"' if answer.corrected_query else ""
    _out.print(f"{answer.total_matches} found: {outcome}{meant}", highlight=False)
    for name, values in (("categories", answer.categories), ("brands", answer.brands)):
        if values:
            _out.print(f"{name}: " + ", ".join(f"{one.value} ({one.item_count})" for one in values), highlight=False)
    degraded = f", degraded: {', '.join(answer.degraded_reasons)}" if answer.degraded else ""
    versions = MessageToDict(answer.versions, preserving_proto_field_name=True)
    _out.print(f"slate {answer.slate_id}, versions {versions}{degraded}")


def suggest(
    prefix: Annotated[str, typer.Argument(help="What has been typed so far.")] = "",
    channel: _Channel = "web",
    limit: Annotated[int, typer.Option(help="How many suggestions, 1 to 20.")] = 8,
    server: _Server = "127.0.0.1:50051",
) -> None:
    """Prints how what has been typed may go on."""
    from concord.v1.search_pb2 import SuggestionKind

    async def call() -> Any:
        async with connected(server, channel) as client:
            return await client.suggest(prefix, limit=limit)

    for one in finished(call()).suggestions:
        kind = SuggestionKind.Name(one.kind).removeprefix("SUGGESTION_KIND_").lower()
        _out.print(f"{one.text}  ({kind})", highlight=False)


def _print_items(answer: Any) -> None:
    from concord.v1 import recommendation_pb2

    table = Table("#", "item", "title", "price", "score", "why")
    for item in answer.items:
        price = f"{item.price.units + item.price.nanos / 1e9:.2f} {item.price.currency_code}"
        reasons = ", ".join(recommendation_pb2.ReasonCode.Name(code).removeprefix("REASON_CODE_").lower() for code in item.reason_codes)
        table.add_row(str(item.position), item.item_id, item.title, price, f"{item.score:.4f}", reasons)
    _out.print(table)


def _money(text: str) -> "Money":
    """Reads an amount with its currency, such as 19.90EUR."""
    from concord.v1.common_pb2 import Money

    if not (found := re.fullmatch(r"(\d{1,13})(?:\.(\d{1,6}))?\s*([A-Z]{3})", text)):
        raise typer.BadParameter("must be an amount and its currency, such as 19.90EUR", param_hint="--max-price")
    units, fraction, currency = found.groups()
    return Money(currency_code=currency, units=int(units), nanos=int((fraction or "").ljust(9, "0")))


def connected(server: str, channel: str) -> "Concord":
    """Returns a client for a channel with the credentials of the settings, to be entered."""
    from concord import Concord

    settings = call_settings()
    return Concord(server, channel=channel, credentials=settings.channel_credentials(), api_key=settings.call_key.get_secret_value())


def _print_how_to_call(address: str, metrics_port: int) -> None:
    _out.print(f"Concord answers on {address}" + (f", metrics on port {metrics_port}" if metrics_port >= 0 else ""))
    _out.print("Call it:", highlight=False)
    _out.print(f"  concord recommend alice --channel app --server {address}", highlight=False)
    body = '{"subject": {"identity": {"channel": "web", "channel_user_id": "alice"}}, "channel": "web", "surface": "home"}'
    _out.print(f"  grpcurl -plaintext -d '{body}' {address} concord.v1.RecommendationService/Recommend", highlight=False, soft_wrap=True)

"""Commands on who is who, asked of a running server: graph, link, unlink, forget."""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from google.protobuf.json_format import MessageToDict
from rich.console import Console

from cli.calls import connected
from server.loop import finished

if TYPE_CHECKING:
    from concord import Concord
    from concord.v1.common_pb2 import Subject

_out = Console()
_Server = Annotated[str, typer.Option(help="Address of a running server; its admin port for unlink and forget where it has one.")]
_WHO = "CHANNEL/ID as that channel knows the customer, or user:ID for Concord's own id."
_Who = Annotated[str, typer.Argument(help=_WHO)]
_Identity = Annotated[str, typer.Argument(help="CHANNEL/ID as that channel knows the customer.")]
_identity = typer.Typer(no_args_is_help=True, help="Shows, links, unlinks and forgets customers.")


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    _identity.command(epilog="Example: concord identity graph app/alice")(graph)
    _identity.command(epilog="Example: concord identity link app/alice web/cookie-7")(link)
    _identity.command(epilog="Example: concord identity unlink web/cookie-7 app/alice")(unlink)
    _identity.command(epilog="Example: concord identity forget app/alice --yes")(forget)
    app.add_typer(_identity, name="identity", epilog="Example: concord identity graph app/alice")


def graph(who: _Who, server: _Server = "127.0.0.1:50051") -> None:
    """Prints the users a customer consists of, their identities, and the links between them."""
    _show(server, "web", lambda client: client.graph(_subject(who)))


def link(identity: _Identity, who: _Who, server: _Server = "127.0.0.1:50051") -> None:
    """Declares two to be one customer and prints which one; `unlink` takes it back."""
    channel, name = _named(identity)
    _show(server, channel, lambda client: client.link(name, _subject(who)))


def unlink(
    identity: _Identity,
    who: Annotated[str, typer.Argument(help=f"Whom to unlink it from: {_WHO} Default: everybody.")] = "",
    server: _Server = "127.0.0.1:50051",
) -> None:
    """Takes links back and prints who is who now: every side has what it would have without them."""
    channel, name = _named(identity)
    _show(server, channel, lambda client: client.unlink(name, _subject(who) if who else None))


def forget(
    who: _Who,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    server: _Server = "127.0.0.1:50051",
) -> None:
    """Erases a customer for good, in every channel, and prints the receipt."""
    if not yes:
        typer.confirm(f"Erase {who} and everybody linked to them, for good?", abort=True)
    _show(server, "web", lambda client: client.forget(_subject(who)))


def _show(server: str, channel: str, ask: Callable[["Concord"], Awaitable[Any]]) -> None:
    async def call() -> Any:
        async with connected(server, channel) as client:
            return await ask(client)

    _out.print_json(data=MessageToDict(finished(call()), preserving_proto_field_name=True, always_print_fields_with_no_presence=True))


def _named(text: str) -> tuple[str, str]:
    channel, separator, name = text.partition("/")
    if not separator:
        raise typer.BadParameter(f"{text!r} is not of the form CHANNEL/ID")
    return channel, name


def _subject(text: str) -> "Subject":
    from concord import user
    from concord.v1.common_pb2 import ChannelIdentity, Subject

    if text.startswith("user:"):
        return user(text.removeprefix("user:"))
    channel, name = _named(text)
    return Subject(identity=ChannelIdentity(channel=channel, channel_user_id=name))

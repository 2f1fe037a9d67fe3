"""IdentityService at the edge: what the domain says becomes what the contract says."""

import grpc
import pytest

from concord.v1 import identity_pb2, identity_pb2_grpc
from concord.v1.common_pb2 import ChannelIdentity, Subject
from server import domain, tokens
from server.errors import PreconditionError
from tests.edge import refusal, serving
from tests.fakes import NOW, Fakes

PHONE, CARD = ChannelIdentity(channel="app", channel_user_id="a"), Subject(identity=ChannelIdentity(channel="web", channel_user_id="b"))


async def test_an_unlink_says_who_is_who_with_tokens_of_all_sides() -> None:
    async with serving() as edge:
        stub = identity_pb2_grpc.IdentityServiceStub(edge.channel)
        answer = await stub.UnlinkIdentity(identity_pb2.UnlinkIdentityRequest(identity=PHONE, subject=CARD))
        await stub.UnlinkIdentity(identity_pb2.UnlinkIdentityRequest(identity=PHONE))
    assert (answer.user_id, answer.user_version, answer.removed_link_count, answer.still_linked) == ("u2", 10, 1, False)
    assert tokens.decode(answer.consistency_token, "") == domain.Token("u2", 10)
    (other,) = answer.separated_customers
    assert tokens.decode(other.consistency_token, "") == domain.Token(other.user_id, other.user_version) == domain.Token("u1", 10)
    phone, card = domain.Subject(channel="app", channel_user_id="a"), domain.Subject(channel="web", channel_user_id="b")
    assert edge.fakes.graph.calls == [(phone, card), (phone, None)]


async def test_a_receipt_counts_hidden_events_as_events() -> None:
    async with serving() as edge:
        stub = identity_pb2_grpc.IdentityServiceStub(edge.channel)
        answer = await stub.ForgetUser(identity_pb2.ForgetUserRequest(subject=CARD))
    assert (answer.receipt_id, answer.forgotten_at.ToDatetime(NOW.tzinfo), answer.online_erased) == ("r1", NOW, True)
    assert answer.counts == identity_pb2.ErasedCounts(
        event_count=3, exposure_count=3, profile_count=4, identity_count=7, link_count=6, persona_count=8
    )


async def test_the_graph_keeps_its_order() -> None:
    async with serving() as edge:
        stub = identity_pb2_grpc.IdentityServiceStub(edge.channel)
        answer = await stub.GetIdentityGraph(identity_pb2.GetIdentityGraphRequest(subject=Subject(user_id="u2")))
    assert (answer.user_id, answer.user_version) == ("u1", 9)
    assert [(persona.user_id, len(persona.identities)) for persona in answer.personas] == [("u1", 2), ("u2", 0)]
    assert [(link.first_user_id, link.second_user_id) for link in answer.links] == [("u1", "u2")]


async def test_what_was_forgotten_is_a_failed_precondition() -> None:
    fakes = Fakes()
    fakes.graph.error = PreconditionError("subject: the customer was forgotten", reason="SUBJECT_FORGOTTEN", field="subject")
    async with serving(fakes) as edge:
        stub = identity_pb2_grpc.IdentityServiceStub(edge.channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.LinkIdentities(identity_pb2.LinkIdentitiesRequest(identity=PHONE, subject=CARD))
    assert (refusal(refused.value).code, refusal(refused.value).reason) == (grpc.StatusCode.FAILED_PRECONDITION, "SUBJECT_FORGOTTEN")

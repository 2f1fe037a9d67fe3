"""IdentityService: who stands behind a channel identity, and who is one with whom."""

from concord.v1 import common_pb2, identity_pb2, identity_pb2_grpc
from server import tokens
from server.domain import Token
from server.errors import NotFoundError
from server.rpc.interceptor import Context
from server.rpc.ports import Erasure, Identities, IdentityGraph
from server.rpc.translate import timestamp_of
from server.rpc.validation import Validator
from server.security.principals import calling


class IdentityServicer(identity_pb2_grpc.IdentityServiceServicer):
    """Resolves, links, unlinks, shows and forgets identities."""

    def __init__(self, identities: Identities, graph: IdentityGraph, erasure: Erasure, validator: Validator) -> None:
        self._identities = identities
        self._graph = graph
        self._erasure = erasure
        self._validator = validator

    async def ResolveIdentity(
        self, request: identity_pb2.ResolveIdentityRequest, _context: Context
    ) -> identity_pb2.ResolveIdentityResponse:
        """Finds, and if asked creates, the customer behind a channel identity."""
        subject = self._validator.identity(request.identity, "identity")
        found = await self._identities.resolve(subject, create=request.create_if_missing)
        if not found.user_id:
            raise NotFoundError("identity: no customer has it", reason="IDENTITY_UNKNOWN", field="identity")
        return identity_pb2.ResolveIdentityResponse(
            user_id=found.user_id,
            created=found.created,
            user_version=found.user_version,
            consistency_token=tokens.encode(Token(found.user_id, found.user_version)),
        )

    async def LinkIdentities(self, request: identity_pb2.LinkIdentitiesRequest, _context: Context) -> identity_pb2.LinkIdentitiesResponse:
        """Declares that a channel identity and a subject are one customer."""
        identity = self._validator.identity(request.identity, "identity")
        subject = self._validator.subject(request.subject, "subject")
        linked = await self._graph.link(identity, subject, may_create=bool(subject.user_id) or calling.get().speaks_for(subject.channel))
        return identity_pb2.LinkIdentitiesResponse(
            user_id=linked.token.user_id,
            user_version=linked.token.version,
            consistency_token=tokens.encode(linked.token),
            merged_user_id=next(iter(linked.merged_user_ids), ""),
        )

    async def UnlinkIdentity(self, request: identity_pb2.UnlinkIdentityRequest, _context: Context) -> identity_pb2.UnlinkIdentityResponse:
        """Takes links back."""
        identity = self._validator.identity(request.identity, "identity")
        subject = self._validator.subject(request.subject, "subject") if request.HasField("subject") else None
        unlinked = await self._graph.unlink(identity, subject)
        return identity_pb2.UnlinkIdentityResponse(
            user_id=unlinked.token.user_id,
            user_version=unlinked.token.version,
            consistency_token=tokens.encode(unlinked.token),
            removed_link_count=unlinked.removed_links,
            still_linked=unlinked.still_linked,
            separated_customers=[
                identity_pb2.SeparatedCustomer(user_id=token.user_id, user_version=token.version, consistency_token=tokens.encode(token))
                for token in unlinked.separated
            ],
        )

    async def ForgetUser(self, request: identity_pb2.ForgetUserRequest, _context: Context) -> identity_pb2.ForgetUserResponse:
        """Erases a customer and returns the receipt."""
        receipt = await self._erasure.forget(self._validator.subject(request.subject, "subject"))
        counts = receipt.counts
        return identity_pb2.ForgetUserResponse(
            receipt_id=receipt.receipt_id,
            forgotten_at=timestamp_of(receipt.forgotten_at),
            counts=identity_pb2.ErasedCounts(
                event_count=counts["events"] + counts["shadowed_events"],
                exposure_count=counts["exposures"],
                profile_count=counts["profiles"],
                identity_count=counts["identities"],
                link_count=counts["links"],
                persona_count=counts["users"],
                turn_count=counts.get("turns", 0),  # receipts of before there was an assistant have none
            ),
            online_erased=receipt.online_erased,
        )

    async def GetIdentityGraph(
        self, request: identity_pb2.GetIdentityGraphRequest, _context: Context
    ) -> identity_pb2.GetIdentityGraphResponse:
        """Returns the personas and links a customer consists of."""
        graph = await self._graph.read(self._validator.subject(request.subject, "subject"))
        return identity_pb2.GetIdentityGraphResponse(
            user_id=graph.token.user_id,
            user_version=graph.token.version,
            personas=[
                identity_pb2.Persona(
                    user_id=persona.user_id,
                    created_at=timestamp_of(persona.created_at),
                    identities=[common_pb2.ChannelIdentity(channel=channel, channel_user_id=name) for channel, name in persona.identities],
                )
                for persona in graph.personas
            ],
            links=[
                identity_pb2.IdentityLink(first_user_id=link.left_id, second_user_id=link.right_id, linked_at=timestamp_of(link.linked_at))
                for link in graph.links
            ],
        )

"""IdentityService: who stands behind a channel identity."""

from concord.v1 import identity_pb2, identity_pb2_grpc
from server import tokens
from server.domain import Token
from server.errors import NotFoundError
from server.rpc.interceptor import Context
from server.rpc.ports import Identities
from server.rpc.validation import Validator


class IdentityServicer(identity_pb2_grpc.IdentityServiceServicer):
    """Resolves and links identities."""

    def __init__(self, identities: Identities, validator: Validator) -> None:
        self._identities = identities
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
        linked = await self._identities.link(identity, self._validator.subject(request.subject, "subject"))
        return identity_pb2.LinkIdentitiesResponse(
            user_id=linked.token.user_id,
            user_version=linked.token.version,
            consistency_token=tokens.encode(linked.token),
            merged_user_id=next(iter(linked.merged_user_ids), ""),
        )

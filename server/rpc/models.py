"""ModelService: which model answers, and the replicas that must be ready for the next."""

import math

from concord.v1 import models_pb2, models_pb2_grpc
from features.models import ModelVersion, OnUnready
from features.replicas import Replica
from server.errors import InvalidRequestError, NotFoundError
from server.rpc import rules
from server.rpc.interceptor import Context
from server.rpc.ports import Models
from server.rpc.translate import timestamp_of

# Left of a call's deadline for the error that says which replica was not ready: better than DEADLINE_EXCEEDED, which names none.
_TO_ANSWER_SECONDS = 0.3
_POLICIES = {
    models_pb2.ACTIVATION_POLICY_UNSPECIFIED: OnUnready.FAIL,
    models_pb2.ACTIVATION_POLICY_FAIL: OnUnready.FAIL,
    models_pb2.ACTIVATION_POLICY_WAIT: OnUnready.WAIT,
}


class ModelServicer(models_pb2_grpc.ModelServiceServicer):
    """Lists models and moves the pointer."""

    def __init__(self, models: Models, *, deadline_seconds: float) -> None:
        self._models = models
        self._deadline = deadline_seconds

    async def ListModels(self, _request: models_pb2.ListModelsRequest, _context: Context) -> models_pb2.ListModelsResponse:
        """Lists the published models, newest first."""
        return models_pb2.ListModelsResponse(models=[self._message(model) for model in await self._models.list()])

    async def GetActiveModel(self, _request: models_pb2.GetActiveModelRequest, _context: Context) -> models_pb2.GetActiveModelResponse:
        """Returns the active model."""
        active = await self._models.active()
        if active is None:
            raise NotFoundError("no model is active", reason="NO_ACTIVE_MODEL")
        return models_pb2.GetActiveModelResponse(model=self._message(active), activation_count=self._models.activation_count)

    async def ActivateModel(self, request: models_pb2.ActivateModelRequest, context: Context) -> models_pb2.ActivateModelResponse:
        """Makes a published model the one that answers."""
        model_version = rules.identifier(request.model_version, "model_version")
        on_unready = _POLICIES.get(request.on_unready)
        if on_unready is None:
            raise InvalidRequestError("on_unready", "must be one of ActivationPolicy")
        remaining = context.time_remaining()
        left = (self._deadline if remaining is None else remaining) - _TO_ANSWER_SECONDS
        wait = min(_wait_of(request, on_unready), max(left, 0.0))
        moved = await self._models.activate(model_version, on_unready=on_unready, wait_seconds=wait)
        return models_pb2.ActivateModelResponse(
            model_version=moved.model_version, previous_model_version=moved.previous, activation_count=moved.activation
        )

    async def ListReplicas(self, _request: models_pb2.ListReplicasRequest, _context: Context) -> models_pb2.ListReplicasResponse:
        """Lists the server processes of the fleet."""
        return models_pb2.ListReplicasResponse(replicas=[_replica(replica) for replica in await self._models.replicas()])

    def _message(self, model: ModelVersion) -> models_pb2.ModelVersion:
        return models_pb2.ModelVersion(
            model_version=model.model_version,
            uri=model.uri,
            published_at=timestamp_of(model.published_at),
            activated_at=timestamp_of(model.activated_at),
            active=model.active,
            metrics=model.manifest["metrics"],
            feature_service=model.manifest["contract"]["name"],
            base_model=model.manifest["base_model"],
            loaded=model.model_version in self._models.loaded,
        )


def _wait_of(request: models_pb2.ActivateModelRequest, on_unready: OnUnready) -> float:
    if request.HasField("wait"):
        return rules.seconds(request.wait, "wait", most=rules.ACTIVATION_WAIT_SECONDS)
    return math.inf if on_unready is OnUnready.WAIT else rules.DEFAULT_ACTIVATION_WAIT_SECONDS


def _replica(replica: Replica) -> models_pb2.Replica:
    return models_pb2.Replica(
        replica_id=replica.replica_id,
        address=replica.address,
        started_at=timestamp_of(replica.started_at),
        seen_at=timestamp_of(replica.seen_at),
        live=replica.live,
        model_version=replica.model_version,
        index_version=replica.index_version,
        ready=[models_pb2.ReadyModel(model_version=model, index_versions=indexes) for model, indexes in sorted(replica.ready.items())],
        failures=replica.failed,
        config_fingerprint=replica.config,
        waits_for=replica.waits_for,
        onnx_provider=replica.onnx_provider,
    )

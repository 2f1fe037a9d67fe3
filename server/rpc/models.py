"""ModelService: which model answers."""

from concord.v1 import models_pb2, models_pb2_grpc
from features.models import ModelVersion
from server.errors import NotFoundError
from server.rpc import rules
from server.rpc.interceptor import Context
from server.rpc.ports import Models
from server.rpc.translate import timestamp_of


class ModelServicer(models_pb2_grpc.ModelServiceServicer):
    """Lists models and moves the pointer."""

    def __init__(self, models: Models) -> None:
        self._models = models

    async def ListModels(self, _request: models_pb2.ListModelsRequest, _context: Context) -> models_pb2.ListModelsResponse:
        """Lists the published models, newest first."""
        return models_pb2.ListModelsResponse(models=[self._message(model) for model in await self._models.list()])

    async def GetActiveModel(self, _request: models_pb2.GetActiveModelRequest, _context: Context) -> models_pb2.GetActiveModelResponse:
        """Returns the active model."""
        active = await self._models.active()
        if active is None:
            raise NotFoundError("no model is active", reason="NO_ACTIVE_MODEL")
        return models_pb2.GetActiveModelResponse(model=self._message(active), activation_count=self._models.activation_count)

    async def ActivateModel(self, request: models_pb2.ActivateModelRequest, _context: Context) -> models_pb2.ActivateModelResponse:
        """Makes a published model the one that answers."""
        moved = await self._models.activate(rules.identifier(request.model_version, "model_version"))
        return models_pb2.ActivateModelResponse(
            model_version=moved.model_version, previous_model_version=moved.previous, activation_count=moved.activation
        )

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

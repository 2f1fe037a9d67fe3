"""FeatureService: reading the online feature store."""

from collections.abc import Sequence
from typing import Any

from concord.v1 import features_pb2, features_pb2_grpc
from features.layout import FeatureValue, Status
from server.rpc.edge import Context
from server.rpc.ports import FeatureReader
from server.rpc.translate import FEATURE_STATUS, timestamp_of
from server.rpc.validation import Validator


class FeatureServicer(features_pb2_grpc.FeatureServiceServicer):
    """Reads online features."""

    def __init__(self, features: FeatureReader, validator: Validator) -> None:
        self._features = features
        self._validator = validator

    async def GetOnlineFeatures(
        self, request: features_pb2.GetOnlineFeaturesRequest, _context: Context
    ) -> features_pb2.GetOnlineFeaturesResponse:
        """Returns the newest values of a feature service, or of single features, for a batch of entities."""
        service, refs, entities = self._validator.features(request)
        rows = await self._features.read(service=service, refs=refs, entities=entities)
        return features_pb2.GetOnlineFeaturesResponse(
            feature_names=list(rows[0].values),
            rows=[features_pb2.FeatureRow(results=[_result(value) for value in row.values.values()]) for row in rows],
        )


def _result(value: FeatureValue) -> features_pb2.FeatureResult:
    """A missing value has neither value nor time."""
    missing = value.status is Status.MISSING
    return features_pb2.FeatureResult(
        value=None if missing else _value(value.value),
        status=FEATURE_STATUS[value.status],
        event_timestamp=None if missing else timestamp_of(value.event_timestamp),
    )


def _value(value: Any) -> features_pb2.FeatureValue:
    """Chooses the kind by the Python type; bool is asked for before int because it is one."""
    if isinstance(value, bool):
        return features_pb2.FeatureValue(bool_value=value)
    if isinstance(value, str):
        return features_pb2.FeatureValue(string_value=value)
    if isinstance(value, int):
        return features_pb2.FeatureValue(int64_value=value)
    if isinstance(value, float):
        return features_pb2.FeatureValue(double_value=value)
    if isinstance(value, bytes):
        return features_pb2.FeatureValue(bytes_value=value)
    return _list(value)


def _list(values: Sequence[Any]) -> features_pb2.FeatureValue:
    """An empty list has no element to tell its type by, and is sent as a list of texts without any."""
    first = values[0] if values else ""
    if isinstance(first, bool):
        return features_pb2.FeatureValue(bool_list_value=features_pb2.BoolList(values=values))
    if isinstance(first, int):
        return features_pb2.FeatureValue(int64_list_value=features_pb2.Int64List(values=values))
    if isinstance(first, float):
        return features_pb2.FeatureValue(double_list_value=features_pb2.DoubleList(values=values))
    return features_pb2.FeatureValue(string_list_value=features_pb2.StringList(values=values))

"""FeatureService: reading the online feature store."""

from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

from concord.v1 import features_pb2, features_pb2_grpc
from features.layout import FeatureColumn, Status
from server.rpc.interceptor import Context
from server.rpc.ports import FeatureReader
from server.rpc.translate import FEATURE_STATUS, timestamp_of
from server.rpc.validation import Validator

_SCALARS = {bool: "bool_value", int: "int64_value", float: "double_value", str: "string_value", bytes: "bytes_value"}
_LISTS = {bool: "bool_list_value", int: "int64_list_value", float: "double_list_value", str: "string_list_value"}


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
        return _response(await self._features.read(service=service, refs=refs, entities=entities))


def _response(table: Mapping[str, FeatureColumn]) -> features_pb2.GetOnlineFeaturesResponse:
    """Copies results that lack only their values, then sets these: 0.7 µs a value; making each from nothing takes 2.5."""
    columns = table.values()
    bare: dict[tuple[int, int], list[features_pb2.FeatureResult]] = {}  # columns of one view share their statuses and times
    for column in columns:
        if (same := (id(column.statuses), id(column.event_timestamps))) not in bare:
            bare[same] = list(map(_without_value, column.statuses, column.event_timestamps))
    rows = zip(*(bare[id(column.statuses), id(column.event_timestamps)] for column in columns), strict=True)
    response = features_pb2.GetOnlineFeaturesResponse(feature_names=list(table))
    for row, values in zip(rows, zip(*(column.values for column in columns), strict=True), strict=True):
        results = response.rows.add().results
        results.extend(row)
        for result, value in zip(results, values, strict=True):
            if value is not None:
                _set(result.value, value)
    return response


@lru_cache(maxsize=4096)
def _without_value(status: Status, at: datetime | None) -> features_pb2.FeatureResult:
    """A missing value has no time either."""
    return features_pb2.FeatureResult(status=FEATURE_STATUS[status], event_timestamp=None if status is Status.MISSING else timestamp_of(at))


def _set(target: features_pb2.FeatureValue, value: Any) -> None:
    """Chooses the kind by the Python type. An empty list has no element to tell its type by, and is sent as a list of texts."""
    if isinstance(value, list):
        chosen = getattr(target, _LISTS[type(value[0]) if value else str])
        chosen.SetInParent()
        chosen.values.extend(value)
    else:
        setattr(target, _SCALARS[type(value)], value)

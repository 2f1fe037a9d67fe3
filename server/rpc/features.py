"""FeatureService: reading the online feature store."""

from datetime import datetime
from functools import lru_cache
from typing import Any

from concord.v1 import features_pb2, features_pb2_grpc
from features.layout import Status
from server.domain import FeatureTable
from server.rpc.interceptor import Context
from server.rpc.ports import FeatureReader
from server.rpc.translate import FEATURE_STATUS, timestamp_of
from server.rpc.validation import Validator

_SCALARS = {bool: "bool_value", int: "int64_value", float: "double_value", str: "string_value", bytes: "bytes_value"}
_LISTS = {bool: "bool_list_value", int: "int64_list_value", float: "double_list_value", str: "string_list_value"}
_MISSING = features_pb2.FeatureResult(status=FEATURE_STATUS[Status.MISSING])  # without value and time


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


def _response(table: FeatureTable) -> features_pb2.GetOnlineFeaturesResponse:
    """Copies rows that lack only their values, then sets these: 0.6 µs a value; making each result from nothing takes 2.5."""
    views = tuple(table.ages)
    places = tuple(views.index(ref.partition(":")[0]) for ref in table.values)
    ages = zip(*(zip(of.statuses, of.event_timestamps, strict=True) for of in table.ages.values()), strict=True)
    response = features_pb2.GetOnlineFeaturesResponse(feature_names=list(table.values))
    for entity, values in zip(ages, zip(*table.values.values(), strict=True), strict=True):
        row = response.rows.add()
        row.CopyFrom(_without_values(places, entity))
        for result, value in zip(row.results, values, strict=True):
            if value is None:
                result.CopyFrom(_MISSING)
            else:
                _set(result.value, value)
    return response


@lru_cache(maxsize=1024)
def _without_values(places: tuple[int, ...], ages: tuple[tuple[Status, datetime | None], ...]) -> features_pb2.FeatureRow:
    """Returns the row of an entity: for each feature which of the views holds it, and how old each view is."""
    results = [features_pb2.FeatureResult(status=FEATURE_STATUS[status], event_timestamp=timestamp_of(at)) for status, at in ages]
    return features_pb2.FeatureRow(results=[results[place] for place in places])


def _set(target: features_pb2.FeatureValue, value: Any) -> None:
    """Chooses the kind by the Python type. An empty list has no element to tell its type by, and is sent as a list of texts."""
    if isinstance(value, list):
        chosen = getattr(target, _LISTS[type(value[0]) if value else str])
        chosen.SetInParent()
        chosen.values.extend(value)
    else:
        setattr(target, _SCALARS[type(value)], value)

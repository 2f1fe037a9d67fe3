"""Deny by default: every method of the contract stands in the one map, and whoever lacks its scope is refused."""

import importlib
import pkgutil

import pytest
from google.protobuf.descriptor import MethodDescriptor

import concord.v1
from server.errors import ForbiddenError
from server.rpc.access import rule_of
from server.security.principals import ANYONE, Principal, of_certificate, principal
from server.security.scopes import ALL_SCOPES, CHANNEL_SCOPES, SCOPE_OF, SCOPE_OF_FLAG, Scope

WEB = principal("key:web/1", ["web"], CHANNEL_SCOPES)


def contract() -> dict[str, MethodDescriptor]:
    names = [module.name for module in pkgutil.iter_modules(concord.v1.__path__) if module.name.endswith("_pb2")]
    services = [service for name in names for service in importlib.import_module(f"concord.v1.{name}").DESCRIPTOR.services_by_name.values()]
    return {f"{service.name}/{method.name}": method for service in services for method in service.methods}


def test_every_method_of_the_contract_has_a_scope() -> None:
    assert len(contract()) >= 15
    assert sorted(set(contract()) - set(SCOPE_OF)) == []


def test_every_scope_is_needed_somewhere() -> None:
    assert set(SCOPE_OF.values()) == ALL_SCOPES


def test_flags_that_need_more_are_fields_of_their_requests() -> None:
    for method, (flag, _, _) in SCOPE_OF_FLAG.items():
        assert flag in contract()[method].input_type.fields_by_name, method


def test_what_changes_all_channels_is_no_right_of_one() -> None:
    assert not CHANNEL_SCOPES & {Scope.ADMIN, Scope.CATALOG_WRITE, Scope.MODELS_READ}
    for method in ("ModelService/ActivateModel", "IdentityService/ForgetUser", "IdentityService/UnlinkIdentity"):
        assert rule_of(method).scope is Scope.ADMIN
        assert rule_of(method).operational


def test_a_method_nobody_listed_has_no_scope() -> None:
    assert rule_of("OracleService/Ask").scope is None


def test_a_caller_needs_the_scope_and_the_channel() -> None:
    WEB.require(Scope.EVENTS_WRITE)
    WEB.require_channels(["web", "", "web"])
    with pytest.raises(ForbiddenError) as lacking:
        WEB.require(Scope.ADMIN)
    with pytest.raises(ForbiddenError) as foreign:
        WEB.require_channels(["web", "app"])
    assert (lacking.value.reason, foreign.value.reason) == ("SCOPE_MISSING", "CHANNEL_FORBIDDEN")
    principal("key:all/1", ["*"], []).require_channels(["web", "app"])


def test_scopes_of_a_later_release_grant_nothing() -> None:
    assert principal("x", ["web"], ["events:write", "world:rule"]).scopes == {Scope.EVENTS_WRITE}
    assert principal("x", [], []).channels == frozenset()


@pytest.mark.parametrize(
    ("names", "channels", "scopes"),
    [
        (["channel:web"], {"web"}, CHANNEL_SCOPES),
        (["gateway.example", "channel:app"], {"app"}, CHANNEL_SCOPES),
        (["operator:anna"], None, ALL_SCOPES),
        (["web.shop.internal"], {"web"}, CHANNEL_SCOPES),
    ],
)
def test_a_certificates_name_says_who_it_is(names: list[str], channels: set[str] | None, scopes: frozenset[Scope]) -> None:
    found = of_certificate(names, {"web.shop.internal": "channel:web"})
    assert found is not None
    assert (found.channels, found.scopes) == (channels, scopes)


@pytest.mark.parametrize("names", [[], ["web"], ["channel:"], ["operator"], ["Channel:web"], ["other.internal"]])
def test_other_names_are_nobody(names: list[str]) -> None:
    assert of_certificate(names, {"web.shop.internal": "channel:web"}) is None


def test_a_key_over_another_channels_certificate_may_do_what_both_may() -> None:
    over_app = WEB.within(Principal("certificate:channel:app", frozenset({"app"}), CHANNEL_SCOPES))
    assert over_app.channels == frozenset()
    assert WEB.within(ANYONE).channels == WEB.channels
    assert ANYONE.within(WEB).channels == WEB.channels
    assert ANYONE.within(WEB).scopes == CHANNEL_SCOPES

"""A short campaign with every run of the tests (`make fuzz` is the long one), and the instruments: they must find what is there."""

import asyncio

import grpc
import psutil
import pytest

from server.settings import ServerSettings
from tests.edge import serving
from tests.fakes import FakeRecommender, Fakes
from tests.fuzz.attack import Attack, Findings
from tests.fuzz.campaign import campaign, modules
from tests.fuzz.cases import KINDS, Words, cases, methods


async def test_a_short_campaign_finds_nothing(live: ServerSettings) -> None:
    verdict = await campaign(live, seed=20261126, count=2_500)
    assert verdict.clean, (verdict.line(), verdict.findings.examples)
    assert verdict.findings.cases == 2_500
    # Nearly right messages do get through: a campaign that is refused at the door everywhere tests nothing.
    answered = {method for method, code in verdict.findings.codes if code == "OK"}
    assert {
        "Recommend",
        "RankItems",
        "RecordEvents",
        "StreamEvents",
        "GetProfile",
        "UpsertItems",
        "GetOnlineFeatures",
        "Search",
        "Suggest",
    } <= answered


def test_every_method_meets_every_kind_of_case_and_seeds_repeat() -> None:
    targets = methods(modules())
    made = list(cases(targets, Words(), seed=3, count=60 * len(targets)))
    assert {(case.method, case.kind) for case in made} == {
        (f"/{method.containing_service.full_name}/{method.name}", kind) for method in targets for kind in KINDS
    }
    assert made == list(cases(targets, Words(), seed=3, count=60 * len(targets)))
    assert made != list(cases(targets, Words(), seed=4, count=60 * len(targets)))


@pytest.mark.parametrize(("error", "finding"), [(RuntimeError("boom"), "internal"), (None, "")])
async def test_the_attack_sees_a_bug(error: Exception | None, finding: str) -> None:
    findings = await _attacked(Fakes(recommender=FakeRecommender(error=error)))
    assert bool(findings.internal) == (finding == "internal")
    assert findings.leaks == findings.crashes == 0


async def test_the_attack_sees_text_that_leaks() -> None:
    from server.errors import NotFoundError

    told = NotFoundError("psycopg.errors.UndefinedTable: relation does not exist", reason="OOPS")
    assert (await _attacked(Fakes(recommender=FakeRecommender(error=told)))).leaks


async def test_the_attack_sees_a_server_that_is_gone() -> None:
    async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
        attack = Attack(psutil.Process(), {"": channel}, grpc.insecure_channel("127.0.0.1:1"), advance=lambda _n: None)
        (case,) = cases([m for m in methods(modules()) if m.name == "GetItems"], Words(), seed=1, count=1)
        findings = await attack.run([case], sample_every=1)
    assert findings.crashes == 1


async def _attacked(fakes: Fakes) -> Findings:
    """Every kind of case at Recommend, with the words that get one past the edge."""
    words = Words(
        {
            "user_id": ["u1"],
            "channel": ["web"],
            "surface": ["home"],
            "consistency_token": [""],
            "page_token": [""],
            "limit": [3],
            "currency_code": ["EUR"],
            "nanos": [0],
        }
    )
    async with serving(fakes, max_in_flight=1_000) as edge:
        attack = Attack(psutil.Process(), {"": edge.channel}, grpc.insecure_channel("127.0.0.1:1"), advance=lambda _n: None)
        targets = [method for method in methods(modules()) if method.name == "Recommend"]
        async with asyncio.timeout(60):
            return await attack.run(cases(targets, words, seed=1, count=300), sample_every=100)

"""The offline checker: each rule of DESIGN.md §1 as a function from a history to what was checked and what broke it.

Nothing here talks to a server. A rule counts what it looked at, so that "no violations" of a run that proved nothing shows.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain

from tests.guarantees.history import History, Listed, Read, Row

REFUSALS = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"})
_EXCERPTS = 5


@dataclass
class Finding:
    """What one rule looked at and what broke it; the first few violations are told in words."""

    rule: str
    checked: int = 0
    violations: int = 0
    excerpts: list[str] = field(default_factory=list)

    def broken(self, *evidence: object) -> None:
        """Counts a violation."""
        self.violations += 1
        if len(self.excerpts) < _EXCERPTS:
            self.excerpts.append(" | ".join(str(part) for part in evidence))


def answered(history: History) -> Finding:
    """Every call was answered or refused in a way the contract allows: nothing INTERNAL, UNKNOWN or CANCELLED."""
    finding = Finding("answered or refused as the contract says")
    for call in chain(history.reads, history.writes, history.offers, history.activations):
        finding.checked += 1
        if call.status != "OK" and call.status not in REFUSALS:
            finding.broken("a status that is no refusal", call)
    return finding


def same_ranking(history: History, *, one_slate: bool = True) -> Finding:
    """C1: equal customer, place, user, model and index version mean one order and one score per position, in every channel.

    With ``one_slate`` also one slate id, which holds while Redis keeps what was committed; after a loss the slate is computed
    again with another ``as_of``, and only its contents must be the same.
    """
    finding = Finding("C1 one ranking per versions")
    places: dict[tuple[object, ...], dict[int, tuple[str, float, Read]]] = defaultdict(dict)
    slates: dict[tuple[object, ...], Read] = {}
    for read in history.reads:
        if not read.whole:
            continue
        finding.checked += 1
        standing = places[read.state]
        last = -1
        for row in history.rows(read):
            item_id, score, other = standing.setdefault(row.position, (row.item_id, row.score, read))
            if row.position <= last:
                finding.broken("positions do not increase", read)
            if (item_id, score) != (row.item_id, row.score):
                finding.broken(f"position {row.position}: {item_id} {score!r} against {row.item_id} {row.score!r}", other, read)
                break
            last = row.position
        if one_slate and read.committed and (first := slates.setdefault(read.state, read)).slate != read.slate:
            finding.broken(f"two slates, {first.slate} and {read.slate}", first, read)
    return finding


def prefixes(history: History) -> Finding:
    """C1: in one channel and at one offer version a smaller limit shows the beginning of a larger one."""
    finding = Finding("C1 smaller limits are prefixes")
    groups: dict[tuple[object, ...], list[Read]] = defaultdict(list)
    for read in history.reads:
        if read.whole and not read.filtered:
            groups[*read.state, read.offer_version, read.channel].append(read)
    for reads in groups.values():
        longest = max(reads, key=lambda read: len(history.rows(read)))
        whole = history.rows(longest)
        for read in reads:
            finding.checked += 1
            if history.rows(read) != whole[: read.limit]:
                finding.broken("no prefix", longest, read)
    return finding


def only_removed(history: History) -> Finding:
    """C1: an item that one answer shows and another of the same state does not, within reach, was filtered out or is not sold there."""
    finding = Finding("C1 filters and channels only remove")
    groups: dict[tuple[object, ...], list[Read]] = defaultdict(list)
    for read in history.reads:
        if read.whole:
            groups[*read.state, read.offer_version].append(read)
    for reads in groups.values():
        known = {row.position: row for read in reads for row in history.rows(read)}
        for read in reads:
            rows = history.rows(read)
            reach = rows[-1].position if len(rows) == read.limit and rows else max(known, default=-1)
            shown = {row.position for row in rows}
            finding.checked += 1
            if read.filtered:
                continue  # what it shows lies in the one order by C1; what it lacks, the filter may have removed
            for position, row in known.items():
                if position <= reach and position not in shown and _sold_in(history.listed.get(row.item_id), read.channel):
                    finding.broken(f"lacks {row.item_id} at position {position}", read)
                    break
    return finding


def _sold_in(item: Listed | None, channel: str) -> bool:
    """Whether the channel surely sells an item; one that came during the run is not known well enough to say."""
    return item is not None and (not item.channels or channel in item.channels)


def one_price(history: History) -> Finding:
    """C1: an offer version has one price and stock of an item, whoever asks where."""
    finding = Finding("C1 one price per offer version")
    prices: dict[tuple[int, str], tuple[tuple[object, ...], Read]] = {}
    for read, row in _shown(history):
        finding.checked += 1
        price = (row.price_micros, row.currency, row.in_stock)
        first, other = prices.setdefault((read.offer_version, row.item_id), (price, read))
        if first != price:
            finding.broken(f"{row.item_id} at offer version {read.offer_version}: {first} against {price}", other, read)
    return finding


def catalogue_price(history: History) -> Finding:
    """C1, C5: the price shown is the one the catalogue had at the answer's offer version, by the acknowledged changes."""
    finding = Finding("C1 prices are the catalogue's")
    uncertain = {offer.item_id for offer in history.offers if offer.status != "OK"}
    changes: dict[str, list[tuple[int, int | None, str]]] = {
        item.item_id: [(item.offer_version, item.price_micros, item.currency)] for item in history.listed.values()
    }
    for offer in sorted((offer for offer in history.offers if offer.status == "OK"), key=lambda offer: offer.offer_version):
        changes.setdefault(offer.item_id, []).append((offer.offer_version, offer.price_micros, offer.currency))
    for read, row in _shown(history):
        if row.item_id in uncertain or row.item_id not in changes:
            continue
        known = [(price, currency) for version, price, currency in changes[row.item_id] if version <= read.offer_version]
        if known:
            finding.checked += 1
            if known[-1] != (row.price_micros, row.currency):
                finding.broken(f"{row.item_id}: {row.price_micros} shown, {known[-1][0]} in the catalogue", read)
    return finding


def _shown(history: History) -> Iterator[tuple[Read, Row]]:
    """Each distinct (body, offer version) once: answers of one body at one offer version say the same."""
    seen: set[tuple[str, int]] = set()
    for read in history.reads:
        if read.answered and (key := (read.body, read.offer_version)) not in seen:
            seen.add(key)
            for row in history.rows(read):
                yield read, row


def fresh_offers(history: History) -> Finding:
    """C1: an answer asked for after a price change was acknowledged names that offer version or a newer one."""
    changes = [offer for offer in history.offers if offer.status == "OK"]
    return _never_older(
        "C1 no offers older than the round trip",
        known=((offer.end, offer.offer_version, offer) for offer in changes),
        asked=((read.start, read.offer_version, read) for read in history.reads if read.whole),
    )


def tokens_honoured(history: History) -> Finding:
    """C2: an answer to a request with a token reflects at least the token's version, flagged or not."""
    finding = Finding("C2 tokens honoured or refused")
    for read in history.reads:
        if read.token:
            finding.checked += 1
            if read.answered and read.user_version < read.token:
                finding.broken(f"version {read.user_version} for a token of {read.token}", read, *_around(history, read))
    return finding


def monotonic(history: History) -> Finding:
    """C3: of one customer, no answer is older than one that ended before it began, nor than a write acknowledged as online."""
    total = Finding("C3 versions never go back")
    known: dict[str, list[tuple[float, int, object]]] = defaultdict(list)
    asked: dict[str, list[tuple[float, int, Read]]] = defaultdict(list)
    for read in history.reads:
        if read.answered:
            known[read.user].append((read.end, read.user_version, read))
            if not read.stale:
                asked[read.user].append((read.start, read.user_version, read))
    for write in history.writes:
        if write.status == "OK" and write.online:
            known[write.user].append((write.end, write.version, write))
    for user, reads in asked.items():
        part = _never_older("", known=known[user], asked=reads)
        total.checked += part.checked
        total.violations += part.violations
        total.excerpts += part.excerpts[: _EXCERPTS - len(total.excerpts)]
    return total


def _never_older(rule: str, *, known: Iterable[tuple[float, int, object]], asked: Iterable[tuple[float, int, Read]]) -> Finding:
    """Walks both in time: whoever asks after something was known must be told at least that."""
    finding = Finding(rule)
    pending = sorted(known, key=lambda entry: entry[0])
    newest: tuple[int, object] = (-1, None)
    position = 0
    for start, version, read in sorted(asked, key=lambda entry: entry[0]):
        while position < len(pending) and pending[position][0] < start:
            newest = max(newest, pending[position][1:], key=lambda entry: entry[0])
            position += 1
        finding.checked += 1
        if version < newest[0]:
            finding.broken(f"{version} after {newest[0]} was known", newest[1], read)
    return finding


def one_model(history: History) -> Finding:
    """C4: between the acknowledgement of an activation and the start of the next one, every answer is that model's."""
    finding = Finding("C4 one model at a time")
    moves = sorted((move for move in history.activations), key=lambda move: move.start)
    reads = sorted((read for read in history.reads if read.answered and not read.stale), key=lambda read: read.start)
    for number, move in enumerate(moves):
        until = moves[number + 1].start if number + 1 < len(moves) else float("inf")
        if move.status != "OK":
            continue  # nobody knows whether it moved: the next one that is acknowledged says
        for read in reads:
            if read.start > move.end and read.end < until:
                finding.checked += 1
                if read.model_version != move.model_version:
                    finding.broken(f"{read.model_version} answered while {move.model_version} was active", move, read)
    return finding


def _around(history: History, read: Read) -> list[object]:
    """What was done to the stores while a read was under way or shortly before."""
    return [fault for fault in history.faults if fault.start <= read.end and fault.end >= read.start - 2.0]


def none_failed(history: History) -> Finding:
    """C4: no request fails while models are switched."""
    finding = Finding("C4 no request fails during a switch")
    for read in history.reads:
        finding.checked += 1
        if not read.answered:
            finding.broken("failed", read)
    return finding


CHECKS: tuple[Callable[[History], Finding], ...] = (
    answered,
    same_ranking,
    prefixes,
    only_removed,
    one_price,
    catalogue_price,
    fresh_offers,
    tokens_honoured,
    monotonic,
    one_model,
)


def check(history: History, *, one_slate: bool = True) -> list[Finding]:
    """Runs every rule."""
    return [same_ranking(history, one_slate=one_slate) if rule is same_ranking else rule(history) for rule in CHECKS]

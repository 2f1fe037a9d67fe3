"""AssistantService: customers' questions."""

from collections.abc import Callable
from uuid import UUID

from concord.v1 import assistant_pb2, assistant_pb2_grpc
from server.assistant.answer import Answer, Format, Kind, OrderLine, Quote
from server.assistant.assistant import Question
from server.rpc import rules
from server.rpc.event_validation import read_event_id
from server.rpc.interceptor import Context
from server.rpc.ports import Assistant
from server.rpc.translate import money_of, token_text, versions_message
from server.rpc.validation import Validator

_FORMATS: dict[int, Format] = {
    assistant_pb2.ANSWER_FORMAT_UNSPECIFIED: Format.PLAIN,
    assistant_pb2.ANSWER_FORMAT_PLAIN: Format.PLAIN,
    assistant_pb2.ANSWER_FORMAT_RICH: Format.RICH,
    assistant_pb2.ANSWER_FORMAT_VOICE: Format.VOICE,
}


class AssistantServicer(assistant_pb2_grpc.AssistantServiceServicer):
    """Answers messages; ``new_event_id`` gives ids to those that bring none."""

    def __init__(self, assistant: Assistant, validator: Validator, *, new_event_id: Callable[[], UUID]) -> None:
        self._assistant = assistant
        self._validator = validator
        self._new_event_id = new_event_id

    async def Ask(self, request: assistant_pb2.AskRequest, _context: Context) -> assistant_pb2.AskResponse:
        """Records a message and answers it."""
        question = Question(
            subject=self._validator.subject(request.subject, "subject"),
            channel=self._validator.channel(request.channel, "channel"),
            text=rules.text(request.text, "text", most=rules.EVENT_TEXT_CHARS, least=1, too_long="TEXT_TOO_LONG"),
            event_id=read_event_id(request.event_id) if request.event_id else self._new_event_id(),
            how=rules.choice(request.format, "format", of=_FORMATS),
            token=self._validator.token(request.consistency_token, "consistency_token"),
        )
        reply = await self._assistant.ask(question)
        turn, shown = reply.turn, reply.shown
        return assistant_pb2.AskResponse(
            text=reply.text,
            kind=f"ANSWER_KIND_{shown.kind.name}",
            citations=_citations(shown),
            confidence=shown.confidence,
            handed_over=shown.kind is Kind.HANDOVER,
            handover_reason=f"HANDOVER_REASON_{shown.reason.name}",
            items=[
                assistant_pb2.AnswerItem(
                    item_id=item.item_id, title=item.title, price=money_of(item.price_micros, item.currency), in_stock=item.in_stock
                )
                for item in shown.items
            ],
            versions=versions_message(turn.versions),
            article_version=turn.article_version,
            turn=turn.number,
            event_id=str(question.event_id),
            user_id=reply.user_id,
            consistency_token=token_text(reply.token),
            phrased=bool(shown.phrased),
        )


def _citations(answer: Answer) -> list[assistant_pb2.Citation]:
    items = [assistant_pb2.Citation(item_id=item.item_id) for item in answer.items]
    lines = [assistant_pb2.Citation(order_line=_line(line)) for line in answer.orders]
    return items + lines + [assistant_pb2.Citation(passage=_passage(quote)) for quote in answer.quotes]


def _line(line: OrderLine) -> assistant_pb2.OrderLine:
    return assistant_pb2.OrderLine(
        event_id=line.event_id, item_id=line.item_id, title=line.title, quantity=line.quantity, day=line.day, returned=line.returned
    )


def _passage(quote: Quote) -> assistant_pb2.PassageCitation:
    return assistant_pb2.PassageCitation(
        article_id=quote.article_id, title=quote.title, url=quote.url, heading=quote.heading, passage=quote.text
    )

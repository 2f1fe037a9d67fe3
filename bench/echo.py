"""A bare grpc.aio server on uvloop that gives the same answer to every call: what gRPC costs in Python before any work is done.

Reads the answer in hex from standard input, prints its port, and serves until it is terminated. `bench/recommend.py` runs it.
"""

import asyncio
import sys
from typing import Any

import grpc
import uvloop


class _Everything(grpc.GenericRpcHandler):
    """Answers whatever method is asked for."""

    def __init__(self, answer: bytes) -> None:
        async def reply(_request: bytes, _context: Any) -> bytes:
            return answer

        self._handler = grpc.unary_unary_rpc_method_handler(reply)

    def service(self, _details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return self._handler


async def _serve(answer: bytes) -> None:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers([_Everything(answer)])
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(bytes.fromhex(sys.stdin.readline())))

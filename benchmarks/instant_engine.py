"""A server on a Unix socket that responds to every request immediately, to measure the latency of a proxy alone."""

from __future__ import annotations

import argparse
import asyncio
from typing import cast

import httptools
import uvloop

_BODY = b'{"object": "list", "data": []}'
_ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(_BODY), _BODY)


class Answering(asyncio.Protocol):
    """One connection, whose requests all get the same response."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio when the connection is open."""
        self.transport = cast(asyncio.Transport, transport)
        self.parser = httptools.HttpRequestParser(self)

    def data_received(self, data: bytes) -> None:
        """Called by asyncio with received bytes."""
        self.parser.feed_data(data)

    def on_message_complete(self) -> None:
        """Called by the parser when a request is complete; sends the response."""
        self.transport.write(_ANSWER)


async def main(socket: str) -> None:
    server = await asyncio.get_running_loop().create_unix_server(Answering, socket)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("socket", help="path of the socket")
    uvloop.run(main(parser.parse_args().socket))

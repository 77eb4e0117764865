"""A TCP proxy that adds a delay to every HTTP request, counts, and can hold requests. Steered over a unix socket with a
line of JSON a connection: {"delay_ms": 20}, {"hold": true}; every answer is the counters. Each request for a range of a blob
becomes a line of RANGES_FILE: monotonic ns, "asked", digest, first byte, last byte; and another with "answered" when as many bytes
as that have been passed back.

    slow_proxy.py PORT UPSTREAM_HOST:PORT CONTROL_SOCKET RANGES_FILE
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import re
import socket
import sys
import time
from collections.abc import Iterator

_BLOB = re.compile(rb"GET /v2/\S+/blobs/(sha256:[0-9a-f]{64})")
_RANGE = re.compile(rb"\r\nrange: *bytes=(\d+)-(\d+)", re.IGNORECASE)


@dataclasses.dataclass
class Asked:
    """What a connection's last request asked for: on HTTP/1.1 the next comes when it is answered."""

    what: str = ""
    left: int = 0  # bytes, headers not counted: a few hundred too many


class Proxy:
    def __init__(self, upstream: str, ranges: str):
        self._ranges = open(ranges, "a", buffering=1)
        self._host, _, port = upstream.rpartition(":")
        self._port = int(port)
        self._delay = 0.0
        self._open = asyncio.Event()
        self._open.set()
        self._counters = {"requests": 0, "bytes": 0, "held": 0, "delayed": 0}

    @contextlib.contextmanager
    def _counted(self, what: str) -> Iterator[None]:
        """Also when the connection ends meanwhile."""
        self._counters[what] += 1
        try:
            yield
        finally:
            self._counters[what] -= 1

    async def control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        words = json.loads(await reader.readline() or b"{}")
        self._delay = float(words.get("delay_ms", self._delay * 1000)) / 1000
        if words.get("hold") is True:
            self._open.clear()
        elif words.get("hold") is False:
            self._open.set()
        writer.write(json.dumps(self._counters).encode() + b"\n")
        await writer.drain()
        writer.close()

    def _note(self, event: str, what: str) -> None:
        self._ranges.write(f"{time.monotonic_ns()} {event} {what}\n")

    async def _requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: Asked) -> None:
        while data := await reader.read(1 << 16):
            if data.startswith((b"GET ", b"HEAD ")):
                self._counters["requests"] += 1
                blob, span = _BLOB.match(data), _RANGE.search(data)
                asked.left = 0
                if blob and span:
                    asked.what = f"{blob[1].decode()} {int(span[1])} {int(span[2])}"
                    asked.left = int(span[2]) + 1 - int(span[1])
                    self._note("asked", asked.what)
                with self._counted("delayed"):
                    await asyncio.sleep(self._delay)
                with self._counted("held"):
                    await self._open.wait()
            writer.write(data)
            await writer.drain()

    async def _answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: Asked) -> None:
        while data := await reader.read(1 << 18):
            self._counters["bytes"] += len(data)
            writer.write(data)
            await writer.drain()
            if asked.left > 0:
                asked.left -= len(data)
                if asked.left <= 0:
                    self._note("answered", asked.what)

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upward = None
        try:
            back, upward = await asyncio.open_connection(self._host, self._port)
            for end in (writer, upward):
                end.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            asked = Asked()
            ways = [
                asyncio.create_task(self._requests(reader, upward, asked)),
                asyncio.create_task(self._answers(back, writer, asked)),
            ]
            # Either end closing ends both ways: nobody on the way uses half-closed connections.
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
        except OSError:
            pass
        finally:
            for end in (writer, upward):
                if end is not None:
                    end.close()


async def main(port: int, upstream: str, control: str, ranges: str) -> None:
    proxy = Proxy(upstream, ranges)
    server = await asyncio.start_server(proxy.connection, "127.0.0.1", port)
    await asyncio.start_unix_server(proxy.control, control)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), *sys.argv[2:5]))

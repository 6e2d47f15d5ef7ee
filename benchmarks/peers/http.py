"""Callers of servers that speak HTTP/1.1: as little as it takes, so that the callers are not what is measured."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from benchmarks.load import Connections

BUSY = {429: "RESOURCE_EXHAUSTED", 503: "RESOURCE_EXHAUSTED"}
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True)
class Http:
    """A POST to the loopback interface."""

    port: int
    path: str
    headers: tuple[tuple[str, str], ...] = ()

    def connect(self) -> Connections:
        return _Streams(self)


class _Streams:
    """Connections that are kept; a call takes one that is idle, or a new one."""

    def __init__(self, post: Http) -> None:
        self._port = post.port
        lines = [f"POST {post.path} HTTP/1.1", f"Host: 127.0.0.1:{post.port}", *(": ".join(h) for h in post.headers)]
        self._head = "\r\n".join(lines) + "\r\nContent-Length: "
        self._idle: list[Stream] = []

    async def call(self, request: bytes, timeout_s: float) -> tuple[str, bytes]:
        try:
            async with asyncio.timeout(timeout_s):
                status, body = await self._post(request)
        except TimeoutError:
            return "DEADLINE_EXCEEDED", b""
        except (OSError, EOFError) as error:
            return "UNAVAILABLE", str(error).encode()
        return "OK" if status == 200 else BUSY.get(status, f"HTTP {status}"), body

    async def close(self) -> None:
        for _, writer in self._idle:
            writer.transport.abort()
        await asyncio.sleep(0)  # when the sockets are closed

    async def _post(self, request: bytes) -> tuple[int, bytes]:
        stream = await self._open()
        try:
            stream[1].write(f"{self._head}{len(request)}\r\n\r\n".encode() + request)
            status, headers = await _head(stream[0])
            body = await _body(stream[0], headers)
        except BaseException:  # an answer that nobody waits for must not be the next caller's
            stream[1].transport.abort()
            raise
        if headers.get("connection") == "close":
            stream[1].transport.abort()
        else:
            self._idle.append(stream)
        return status, body

    async def _open(self) -> Stream:
        while self._idle:
            stream = self._idle.pop()
            if not stream[0].at_eof():
                return stream
            stream[1].transport.abort()
        return await asyncio.open_connection("127.0.0.1", self._port)


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    first, *lines = (await reader.readuntil(b"\r\n\r\n"))[:-4].decode("latin-1").split("\r\n")
    fields = (line.partition(":") for line in lines)
    return int(first.split(" ", 2)[1]), {name.lower(): value.strip().lower() for name, _, value in fields}


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if headers.get("transfer-encoding") != "chunked":
        return await reader.readexactly(int(headers.get("content-length", "0")))
    parts = []
    while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
        parts.append(await reader.readexactly(size))
        await reader.readexactly(2)
    await reader.readexactly(2)
    return b"".join(parts)

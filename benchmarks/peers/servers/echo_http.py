"""What the callers can do: an HTTP/1.1 server that sends back what it gets."""

import asyncio
import os

LENGTH = b"content-length: "


async def same(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while not reader.at_eof():
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        body = await reader.readexactly(int(head[head.index(LENGTH) + len(LENGTH) :].split(b"\r\n", 1)[0]))
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)


async def serve() -> None:
    server = await asyncio.start_server(same, "127.0.0.1", int(os.environ["PEER_PORT"]))
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve())

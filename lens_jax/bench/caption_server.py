"""A server that captions nothing: it reads a whole request, waits as long as a model would take, and says a sentence.

Run as a process of its own by `lens-jax bench captions`, so that its time is not counted with the client's.
"""

import asyncio
import itertools
import json
import sys

_NUMBERS = itertools.count()


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: float) -> None:
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            if head.startswith(b"get "):
                reply = {"object": "list", "data": []}
            else:
                length = head.partition(b"content-length:")[2].partition(b"\r\n")[0]
                await reader.readexactly(int(length))
                await asyncio.sleep(seconds)
                reply = _said(next(_NUMBERS))
            body = json.dumps(reply).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body))
            writer.write(body)
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


def _said(number: int) -> dict:
    """A caption of about as many words as the report's, 109."""
    text = (
        f"A weathered fishing boat with a chipped blue hull, numbered {number} in white paint, rests on wet sand at "
        "low tide. Its mast leans to the right, and a coil of orange rope hangs over the bow. Two gulls stand on the "
        "stern rail, one with a raised wing, while a third picks at seaweed near a rusted anchor. Behind the boat a "
        "stone jetty runs into calm grey water, where three smaller dinghies float side by side. A man in a yellow "
        "coat and black boots walks along the jetty with a bucket. Low clouds cover the sky, and soft light from the "
        "left gives everything the muted look of an old documentary photograph taken in early spring."
    )
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": 1115, "completion_tokens": 145, "total_tokens": 1260}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": choices, "usage": usage}


async def _main(seconds: float) -> None:
    serve = lambda reader, writer: _serve(reader, writer, seconds)
    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1 << 20, backlog=512)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_main(float(sys.argv[1])))

#!/bin/sh
# Python 3.11's asyncio (uvicorn 0.54.0 serves through it) turns Nagle's algorithm off for connections of a listening
# socket that was made with proto=IPPROTO_TCP, as its own are. socket.create_server() makes sockets with proto=0, which
# are TCP all the same; a server that is given one leaves the algorithm on, so an answer in two writes on a connection
# that stays open waits for the client's delayed acknowledgement (44 ms a request were seen on loopback on Linux, 2 after
# TCP_NODELAY was set on the listening socket, which accepted connections inherit).
# Seen: "own socket: no delay", "create_server: delay", "create_server with TCP_NODELAY: no delay". Exits 1 if that changes.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/try.py" <<'PY'
import asyncio, socket
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

seen = []

class Watched(H11Protocol):
    def connection_made(self, transport):
        connection = transport.get_extra_info("socket")
        seen.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        super().connection_made(transport)

async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})

async def told(name, given):
    config = uvicorn.Config(app, host="127.0.0.1", port=0, http=Watched, lifespan="off", log_level="critical")
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve(sockets=given))
    while not server.started:
        await asyncio.sleep(0.01)
    port = given[0].getsockname()[1] if given else server.servers[0].sockets[0].getsockname()[1]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    await reader.read()
    writer.close()
    server.should_exit = True
    await task
    print(f"{name}: {'no delay' if seen[-1] else 'delay'}")

plain, mended = (socket.create_server(("127.0.0.1", 0)) for _ in range(2))
mended.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
for name, given in [("own socket", None), ("create_server", [plain]), ("create_server with TCP_NODELAY", [mended])]:
    asyncio.run(told(name, given))
PY
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "uvicorn==0.54.0" "h11==0.16.0"
"$work/venv/bin/python" "$work/try.py" | tee "$work/told"
printf 'own socket: no delay\ncreate_server: delay\ncreate_server with TCP_NODELAY: no delay\n' | cmp - "$work/told"

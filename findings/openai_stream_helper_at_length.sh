#!/bin/sh
# openai 3.57.0: a plain reply (no response_format) that ends with finish_reason "length" is an answer for
# chat.completions.create(stream=True), but the streaming helper chat.completions.stream refuses it: after all of its text
# came as events, it raises LengthFinishReasonError. So a server's clean end at max_tokens can be an exception at the client,
# and who uses the helper must catch it or take the text from the events.
# Seen: "create: Hello; events: Hello; helper: LengthFinishReasonError". Exits 1 if that changes.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/try.py" <<'PY'
import json, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import openai

HEAD = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
DELTAS = [({"role": "assistant", "content": "Hello"}, None), ({}, "length")]

class Server(BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        chunks = [HEAD | {"choices": [{"index": 0, "delta": d, "finish_reason": f}]} for d, f in DELTAS]
        body = "".join(f"data: {json.dumps(c)}\n\n" for c in chunks) + "data: [DONE]\n\n"
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.wfile.write(body.encode())

server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.server_port}", api_key="none")
asked = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
plain = "".join(part.choices[0].delta.content or "" for part in client.chat.completions.create(**asked, stream=True))
events, fault = "", "the reply"
try:
    with client.chat.completions.stream(**asked) as stream:
        for event in stream:
            events += event.delta if event.type == "content.delta" else ""
        stream.get_final_completion()
except Exception as error:
    fault = type(error).__name__
print(f"create: {plain}; events: {events}; helper: {fault}")
PY
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "openai==3.57.0"
"$work/env/bin/python" "$work/try.py" | tee "$work/told"
grep -qx "create: Hello; events: Hello; helper: LengthFinishReasonError" "$work/told"

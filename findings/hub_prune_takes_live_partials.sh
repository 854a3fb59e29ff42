#!/bin/sh
# huggingface_hub 2.4.0: `hf cache prune` takes the partial file of a download that is running for one that was given up
# (it looks at no lock), and removes it. The download goes on into the file that lost its name, receives every byte, and
# fails at the end with FileNotFoundError: nothing of it is kept. So a program that downloads into the shared cache must
# notice that its partial file is gone. Seen: "pruned: 1, download: FileNotFoundError, bytes sent: 8388608 of 8388608".
# Exits 1 if that changes.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q "huggingface_hub==2.4.0"
cat > "$work/try.py" <<'PY'
import os, subprocess, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SIZE, PIECE, sent = 8 << 20, 1 << 20, 0
flowing, go_on = threading.Event(), threading.Event()

class Hub(BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def do_HEAD(self): self.answer()
    def do_GET(self): self.answer()
    def answer(self):
        global sent
        if not self.path.endswith("/model.safetensors"): return self.send_error(404)
        self.send_response(200)
        for key, value in {"Content-Length": SIZE, "X-Repo-Commit": "a" * 40, "ETag": '"%s"' % ("b" * 40)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        while self.command == "GET" and sent < SIZE:
            self.wfile.write(bytes(PIECE))
            sent += PIECE
            flowing.set()
            go_on.wait()

server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
environment = os.environ | {
    "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": sys.argv[1], "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "120",
}
code = "from huggingface_hub import hf_hub_download; hf_hub_download('a/b', 'model.safetensors')"
download = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)
flowing.wait()
hf = os.path.join(os.path.dirname(sys.executable), "hf")
pruned = subprocess.run([hf, "cache", "prune", "-y"], env=environment, capture_output=True, text=True, check=True).stdout
go_on.set()
fault = download.communicate()[1].strip().splitlines()[-1].partition(":")[0]
print(f"pruned: {pruned.count('Deleted 1 incomplete')}, download: {fault}, bytes sent: {sent} of {SIZE}")
PY
"$work/env/bin/python" "$work/try.py" "$work/home" | tee "$work/told"
grep -qx "pruned: 1, download: FileNotFoundError, bytes sent: 8388608 of 8388608" "$work/told"

#!/bin/sh
# huggingface_hub 2.4.0: a snapshot of which only some files were asked for (allow_patterns) is kept with a listing of
# all files, trees/<commit>.json. Offline, snapshot_download() without patterns then raises IncompleteSnapshotError, where
# 0.36.2 returns the folder. Without trees/ 2.4.0 returns it, too: so another program that fills the cache must not write
# that listing unless it fetches every file of it, .gitattributes included.
# Seen: "2.4.0: IncompleteSnapshotError; without trees/: the folder", "0.36.2: the folder". Exits 1 if that changes.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/try.py" <<'PY'
import json, os, shutil, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SHA, FILES = "a" * 40, {"config.json": b"{}", ".gitattributes": b"# none\n"}
class Hub(BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def do_HEAD(self): self.answer()
    def do_GET(self): self.answer()
    def answer(self):
        body = FILES.get(self.path.split("?")[0].rpartition("/")[2])
        if self.path.startswith("/api/"):
            tree = [{"type": "file", "path": p, "size": len(b), "oid": p.encode().hex().ljust(40, "0")[:40]} for p, b in FILES.items()]
            info = {"id": "a/b", "sha": SHA, "siblings": [{"rfilename": p} for p in FILES]}
            body = json.dumps(tree if "/tree/" in self.path else info).encode()
        self.send_response(200)
        for key, value in {"Content-Length": len(body), "X-Repo-Commit": SHA, "ETag": '"%s"' % ("b" * 40)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET": self.wfile.write(body)
server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": sys.argv[1], "HF_HUB_DISABLE_XET": "1",
               "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
import huggingface_hub as hub

def offline():
    try:
        return "the folder" if hub.snapshot_download("a/b", local_files_only=True) == folder else "another folder"
    except Exception as error:
        return type(error).__name__

folder = hub.snapshot_download("a/b", allow_patterns="*.json")
told = offline()
trees = os.path.join(folder, "..", "..", "trees")
if os.path.isdir(trees):
    shutil.rmtree(trees)
    import huggingface_hub._tree_cache as cache  # what this process remembers of it
    cache._IN_MEMORY_TREE_CACHE.clear()
    told += "; without trees/: " + offline()
print(f"{hub.__version__}: {told}")
PY
for version in 2.4.0 0.36.2; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "huggingface_hub==$version"
    "$work/$version/bin/python" "$work/try.py" "$work/home-$version" | tee -a "$work/told"
done
grep -qx "2.4.0: IncompleteSnapshotError; without trees/: the folder" "$work/told"
grep -qx "0.36.2: the folder" "$work/told"

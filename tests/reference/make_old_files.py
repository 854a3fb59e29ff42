"""Files as an earlier version writes them, and its replies, for tests/test_old_files.py.

Run in a checkout of that version (4ec79e8), so that `dbrx_cli` and `model` are those:

    python .../make_old_files.py MODEL OUT

MODEL: the folder that `make_model` of tests/test_old_files.py writes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

FIRST, SECOND = "Which rivers flow through Basel?", "And through Wien?"


def dbrx(*args: str | Path, stdin: str = "") -> str:
    """What the command prints."""
    command = [sys.executable, "-m", "dbrx_cli", *map(str, args)]
    return subprocess.run(command, input=stdin, stdout=subprocess.PIPE, text=True, check=True).stdout


def main(model: Path, out: Path) -> None:
    os.environ |= {"DBRX_CONFIG": str(out / "config.toml"), "DBRX_DATA": str(out)}
    for scheme in ("int8", "int4"):
        dbrx("quantize", model, out / scheme, "--to", scheme)
    replies = {}
    common = ("-t", "0", "-n", "12", "--json")
    for name, folder in (("floats", model), ("int8", out / "int8"), ("int4", out / "int4")):
        replies[name] = json.loads(dbrx("generate", "-m", folder, *common, FIRST))["token_ids"]
    dbrx("generate", "-m", model, *common, "--prompt-cache", out / "prompt.cache", FIRST)
    dbrx("generate", "-m", model, *common, "--resume", out / "reply.journal", FIRST)
    dbrx("config", "set", "temperature", "0")
    dbrx("config", "set", "max_tokens", "12")
    with (out / "config.toml").open("a") as file:
        file.write("[profiles.short]\nmax_tokens = 3\n")
    dbrx("chat", "-m", model, stdin=f"{FIRST}\n{SECOND}\n/save rivers\n")
    (out / "replies.json").write_text(json.dumps(replies) + "\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

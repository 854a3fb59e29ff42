"""Processes that download, for tests that kill them: a script that imports once and forks a child a download.

Its environment (HF_ENDPOINT, HF_HOME, ...) is set as for any Hub client. A child writes its result to a file.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast


class Clients:
    """Starts and awaits downloads in processes of their own."""

    def __init__(self, endpoint: str, home: Path, **environment: str) -> None:
        self.home = home
        home.mkdir(parents=True, exist_ok=True)
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        hub = {
            "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        }  # fmt: skip
        self._script = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clean | hub | environment,
            cwd=Path(__file__).parent.parent,
        )  # fmt: skip
        self._count = 0

    def start(self, function: str, *args: Any, **kwargs: Any) -> int:
        """`fetch` (download) or `find` (resolve without network) in a new process; returns its process id."""
        self._count += 1
        return int(self._ask({"function": function, "args": args, "kwargs": kwargs, "number": self._count}))

    def wait(self, pid: int) -> dict[str, Any]:
        """The end of a process: status (negative: signal), and unless it was killed value or error, seconds, stderr."""
        return cast("dict[str, Any]", self._ask({"wait": pid}))

    def call(self, function: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Start and wait."""
        return self.wait(self.start(function, *args, **kwargs))

    def close(self) -> None:
        assert self._script.stdin and self._script.stdout
        self._script.stdin.close()
        self._script.stdout.close()
        self._script.wait(10)

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, question: dict[str, Any]) -> Any:
        assert self._script.stdin and self._script.stdout
        self._script.stdin.write(json.dumps(question) + "\n")
        self._script.stdin.flush()
        return json.loads(self._script.stdout.readline())


def _main() -> None:
    import logging

    import huggingface_hub.utils
    from huggingface_hub import get_session  # the import is what takes time

    import model.hub
    from model.errors import DbrxError
    from model.hub import retry

    if os.environ.get("BREAK_LOCKS"):  # as on file systems where every caller gets the lock
        setattr(huggingface_hub.utils, "WeakFileLock", lambda path, timeout: contextlib.nullcontext())  # noqa: B010
    if os.environ.get("QUICK"):
        retry.STALL_SECONDS, retry.OVERDUE_SECONDS, retry.FIRST_PAUSE = 1.0, 0.5, 0.02
    get_session()
    functions: dict[str, Callable[..., Path]] = {
        "fetch": lambda name, to=None: model.hub.download(name, to=Path(to) if to else None),
        "find": lambda name: model.hub.resolve(name, download=False),
    }
    home = Path(os.environ["HF_HOME"])
    files: dict[int, Path] = {}
    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            pid = question["wait"]
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            written = files[pid].with_suffix(".json")
            answer = json.loads(written.read_text()) if written.exists() else {}
            print(json.dumps({"status": status, "stderr": files[pid].read_text(), **answer}), flush=True)
            continue
        output = home / f"client-{question['number']}.txt"
        output.touch()
        heard, begins = os.pipe()
        pid = os.fork()
        if pid:
            files[pid] = output
            os.close(begins)
            os.read(heard, 1)  # it runs; Python would forget a signal that came before
            os.close(heard)
            print(pid, flush=True)
            continue
        stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        if os.environ.get("LOG_EVERYTHING"):
            logging.basicConfig(level=logging.DEBUG, force=True)
        begun = time.monotonic()
        result: dict[str, Any] = {}
        try:
            os.close(begins)
            value = functions[question["function"]](*question["args"], **question["kwargs"])
            result, status = {"value": str(value)}, 0
        except DbrxError as error:
            result = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
            status = error.exit_code
        except KeyboardInterrupt:
            status = 130
        result["seconds"] = time.monotonic() - begun
        output.with_suffix(".json").write_text(json.dumps(result))
        os._exit(status)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    _main()

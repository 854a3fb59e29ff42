"""Requests that schemathesis makes up from the OpenAPI document, for a server here: `make test-schemathesis`.

SCHEMATHESIS: the program, of an environment of its own. More words on the command line are handed on to it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from dbrx_cli.server.service import Limits
from tests.conftest import TINY
from tests.served import Served
from tests.test_server import engine_of
from tests.test_tokenizer_files import folder_of, small_json
from tests.weights import make_checkpoint

CASES = 1000
PATHS = 6
# A request can fit the document and yet be refused: a prompt too long, a schema that nothing fits, a key that is no id.
LEFT_OUT = "positive_data_acceptance"


def main() -> int:
    from model.chat_template import CHATML

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "small"
        make_checkpoint(folder, TINY | {"d_model": 96, "vocab_size": 320, "max_seq_len": 64}, seed=1, shards=1)
        folder_of(folder, small_json(), tokenizer_class="GPT2Tokenizer", chat_template=CHATML)
        with Served(lambda: engine_of(folder), Limits(queue=1000)) as served:
            command = [
                os.environ.get("SCHEMATHESIS", "schemathesis"), "run", served.url.replace("/v1", "/openapi.json"),
                "--max-examples", str(CASES // PATHS + 1), "--exclude-checks", LEFT_OUT, "--seed", "1", *sys.argv[1:],
            ]  # fmt: skip
            return subprocess.run(command, cwd=scratch).returncode


if __name__ == "__main__":
    raise SystemExit(main())

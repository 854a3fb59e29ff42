#!/usr/bin/env bash
# Runs the quick tests with another release of PyTorch, in an environment that is thrown away:
#   tests/with_torch.sh 2.14.1 [pytest's arguments]
# A build for CUDA takes several GB of download and disk; the index that pip is set up with decides which build it is.
set -euo pipefail
version=${1:?a release of PyTorch, such as 2.14.1}
shift
cd "$(dirname "$0")/.."
where=$(mktemp -d "${TMPDIR:-/tmp}/dbrx-torch.XXXXXX")
trap 'rm -rf "$where"' EXIT
"${PYTHON:-python3}" -m venv "$where"
"$where/bin/python" -m pip install --quiet "pip>=25.1"
"$where/bin/python" -m pip install --quiet "torch==$version"
# The range in pyproject.toml may not let that release in yet: everything else is installed as it says, this is not.
"$where/bin/python" -c '
import re, tomllib
for line in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]:
    if re.match(r"[\w.-]+", line)[0] != "torch":
        print(line)
' > "$where/requirements.txt"
"$where/bin/python" -m pip install --quiet "torch==$version" -r "$where/requirements.txt" --group dev
"$where/bin/python" -m pip install --quiet --no-deps --editable .
"$where/bin/python" -c 'import torch; print("torch", torch.__version__)'
"$where/bin/python" -m pytest -n 2 --dist worksteal -m "not (slow or soak or bench or gpu or reference or install or vllm or llm or clients)" "$@"

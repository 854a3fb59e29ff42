"""The command line of DBRX."""

from . import early

early.end_quietly()  # while the program is imported, until main() hears of Ctrl-C
early.tell_lack_of_memory()

import sys  # noqa: E402
from importlib.util import find_spec  # noqa: E402
from pathlib import Path  # noqa: E402

__version__ = "0.1.0.dev0"


def check_model_package() -> None:
    """A stray model.py in the user's folder must not be taken for ours."""
    spec = find_spec("model")
    found = Path(spec.origin).resolve().parent if spec and spec.origin else None
    wanted = Path(__file__).resolve().parent.parent / "model"
    if found != wanted:
        print(
            f"dbrx: `model` is taken from {str(found)!r}, not from {wanted}; start dbrx from another folder",
            file=sys.stderr,
        )
        raise SystemExit(1)

"""Checkpoints from the Hugging Face Hub: find them in the cache, plan a download, download, verify.

The cache is the one that every other Hub client uses, in both directions. What this package adds to huggingface_hub:
downloads resume across processes, every file is checked against its checksum before it gets its name, a bad network
ends within half a minute, and Ctrl-C within a second. No torch, no terminal; huggingface_hub is imported when needed.
"""

from .download import download
from .layout import missing_files
from .listing import HubFile
from .plan import CHECKPOINT_PATTERNS, DownloadPlan, plan_download
from .progress import Progress
from .resolve import resolve
from .verify import Problem, verify_cached

__all__ = [
    "CHECKPOINT_PATTERNS",
    "DownloadPlan",
    "HubFile",
    "Problem",
    "Progress",
    "download",
    "missing_files",
    "plan_download",
    "resolve",
    "verify_cached",
]

"""Way 1: what was said, and by whom."""

from dataclasses import dataclass
from typing import Literal, get_args

from .errors import InputError

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = get_args(Role)
# 32,768 positions of at most 128 bytes: nothing larger fits DBRX, and this much takes a few seconds at worst.
MAX_TEXT = 4 * 1024 * 1024


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. token_ids: as they were sampled, of a reply that can go on just there."""

    role: Role
    content: str
    token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role {self.role!r} is not one of {', '.join(ROLES)}")


def check_size(size: int) -> None:
    """Refuse more text than any context holds, before time and memory are spent on it."""
    if size > MAX_TEXT:
        raise InputError(
            f"the text has {size / 2**20:.1f} MiB; at most {MAX_TEXT // 2**20} MiB can be encoded at once",
            "shorten it: the model's context holds less",
        )

"""What Tab offers: names that exist on this machine, found without torch and without the network.

The scripts of the shells put an answer into `eval` and word splitting, so only plain names are offered.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

PLAIN = re.compile(r"[\w@+:][\w@+:./-]*")


def _offers(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """A completion of these names; a fault, told to nobody, offers none."""

    def complete(incomplete: str) -> list[str]:
        try:
            return [name for name in names() if name.startswith(incomplete) and PLAIN.fullmatch(name)]
        except Exception:
            return []

    return complete


@_offers
def model_names() -> Iterable[str]:
    """The demo models and what is in the Hub's cache."""
    from dbrx_cli.demo import RECIPES
    from model.hub.inventory import inventory

    return [*RECIPES, *sorted({model.name for model in inventory()})]


@_offers
def session_names() -> Iterable[str]:
    """Names of sessions; the numbers of those without one that is plain."""
    from dbrx_cli.store import Store

    with Store.open() as store:
        entries = store.list(limit=50)
    return [entry.name if entry.name and PLAIN.fullmatch(entry.name) else str(entry.id) for entry in entries]


@_offers
def profile_names() -> Iterable[str]:
    """The profiles of the settings file."""
    from dbrx_cli.settings_file import SettingsFile

    return SettingsFile.read().profiles


@_offers
def setting_keys() -> Iterable[str]:
    """The keys of the settings file."""
    from dbrx_cli.settings import SETTINGS

    return SETTINGS

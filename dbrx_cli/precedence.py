"""Where a flag's value comes from when it is not given: environment, profile, settings file, default, in this order.

The file's values reach a command as its context's `default_map`, which Typer asks after the command line and the
environment; nothing else reads the file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import typer

from dbrx_cli.settings import SETTINGS, Found

ORIGINS = "dbrx.origins"  # in a context's meta: parameter -> where its setting was read


def in_file(profile: str | None) -> dict[str, Found]:
    """What the settings file says, by key; the profile's values before those at the top.

    `InputError` names file, line and the likeliest key where something is wrong.
    """
    from dbrx_cli.settings_file import SettingsFile  # reads TOML

    return SettingsFile.read().values(profile)


def in_force(profile: str | None) -> dict[str, Found]:
    """All that is set, by key; the environment before the file. Values of the environment are text."""
    found = in_file(profile)
    for key, setting in SETTINGS.items():
        if value := os.environ.get(setting.variable):
            found[key] = Found(value, setting.variable)
    return found


def apply(context: typer.Context, profile: str | None) -> str | None:
    """The callback of --profile, which is read before other flags: give the command the file's values."""
    if context.resilient_parsing:  # completion: a fault in the file must not end it
        return profile
    found = in_file(profile)
    names = {parameter.envvar: parameter.name for parameter in context.command.params if parameter.envvar}
    given = {names[SETTINGS[key].variable]: value for key, value in found.items() if SETTINGS[key].variable in names}
    context.default_map = {name: value.value for name, value in given.items()}
    context.meta[ORIGINS] = {name: value.origin for name, value in given.items()}
    return profile


def with_origin(context: typer.Context | None, message: str) -> str:
    """The message of a fault; if it speaks of a setting that was not typed, it says where that was set."""
    for parameter in context.command.params if context else ():
        origin = _origin_of(context, parameter) if context else None
        words = {parameter.name, *parameter.opts}
        if origin and any(re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", message) for word in words if word):
            return f"{message.rstrip('.')} (set by {origin})"
    return message


def _origin_of(context: typer.Context, parameter: Any) -> str | None:
    source = context.get_parameter_source(parameter.name)
    if source is None or parameter.envvar is None:
        return None
    origins: Mapping[str, str] = context.meta.get(ORIGINS, {})
    return {"ENVIRONMENT": parameter.envvar, "DEFAULT_MAP": origins.get(parameter.name)}.get(source.name)

"""The one exception that reaches the user: what is wrong, what is allowed, what to do."""

from __future__ import annotations


class ExportError(Exception):
    """An input that cannot be exported; the message names it and the remedy."""


def refuse(component: str, key: str, value: object, allowed: str) -> ExportError:
    """Builds the error for a config value the exporter does not support."""
    return ExportError(f"{component}/config.json: `{key}` is {value!r}, which is not supported; allowed: {allowed}")

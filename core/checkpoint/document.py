"""Reads JSON objects from a checkpoint strictly, so that what is wrong is said with the file and the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from plexor.errors import CheckpointError


class _RepeatedKeyError(ValueError):
    """An object names a key twice, where plain JSON parsing would keep the last one silently."""


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; CheckpointError when it is missing, unreadable or something other than an object."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); download the checkpoint again or mend the permissions."
        ) from error
    return parse_object(content, str(path))


def parse_object(content: bytes, where: str) -> dict[str, Any]:
    """The JSON object in some bytes; `where` names their place in the CheckpointError when they hold no such thing."""
    try:
        document = json.loads(content.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{where} is not UTF-8 text (byte {error.start} of {len(content)} is {content[error.start]:#04x}); "
            "download the file again."
        ) from error
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{where} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}; "
            "download the file again or mend that line."
        ) from error
    except _RepeatedKeyError as error:
        raise CheckpointError(
            f"{where} names {quote(str(error))} twice, so one of the two would be lost; remove one."
        ) from error
    except RecursionError as error:
        raise CheckpointError(
            f"{where} is nested too deeply to be read; it does not come from a real model."
        ) from error
    except ValueError as error:
        raise CheckpointError(
            f"{where} holds a number that cannot be read ({error}); download the file again."
        ) from error
    if not isinstance(document, dict):
        raise CheckpointError(
            f"{where} holds a JSON {type(document).__name__} where an object is expected; download the file again."
        )
    return document


def quote(name: str) -> str:
    """A name from a file as it may be printed: on one line, without control characters, at most 200 characters."""
    return repr(name) if len(name) <= 200 else repr(name[:200]) + f"... ({len(name)} characters)"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _RepeatedKeyError(key)
            seen.add(key)
    return document

"""Renders a conversation through the template that comes with a checkpoint, in a sandbox with limits.

A template is a program from a stranger. The sandbox keeps it away from Python's insides; every turn of a loop and every
call looks at the clock, the text is measured while it grows, and `*` and `**` may not build something huge. What is
not caught: one filter or `~` that builds a huge string at once, such as `"x" | center(10 ** 9)`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from threading import Lock
from typing import Any, Final

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from plexor.errors import RequestError

_REASONING_KEYS: Final = ("reasoning_content", "thinking", "reasoning")
_MAX_BITS: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderLimits:
    """What one rendering may take; a million tokens of context are about four million characters."""

    seconds: float = 5.0
    characters: int = 1 << 24


class ChatTemplate:
    """A Jinja template for conversations, with what published templates expect to find around them.

    named_tokens: "bos_token", "eos_token" and so on, which the template sees as variables.
    It is compiled at first use, so that a broken template does not stand in the way of plain prompts.
    """

    def __init__(self, source: str, named_tokens: Mapping[str, str], *, limits: RenderLimits | None = None) -> None:
        self._source = source
        self._named_tokens = dict(named_tokens)
        self._environment = _Environment(limits or RenderLimits())
        self._lock = Lock()

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation, special tokens included; RequestError if it or the template is at fault."""
        plain = _plain_messages(messages)
        with self._lock:
            self._environment.start()
            try:
                return self._joined(plain, add_generation_prompt)
            except RequestError:
                raise
            except jinja2.TemplateSyntaxError as error:
                raise RequestError(
                    f"The model's chat template is not valid Jinja ({error.message}, line {error.lineno}); "
                    "mend it or send a plain prompt.",
                    field="messages",
                ) from error
            except Exception as error:  # a template can raise whatever Python can
                reason = " ".join(str(error).split()) or type(error).__name__
                raise RequestError(
                    f"The model's chat template refuses these messages: {reason}", field="messages"
                ) from error

    def _joined(self, messages: list[Any], add_generation_prompt: bool) -> str:
        pieces, num_characters = [], 0
        for piece in self._template.generate(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self._named_tokens,
        ):
            num_characters += len(piece)
            self._environment.check_size(num_characters)
            self._environment.tick()
            pieces.append(piece)
        return "".join(pieces)

    @cached_property
    def _template(self) -> jinja2.Template:
        tree = self._environment.parse(self._source)
        for loop in tree.find_all(nodes.For):
            loop.body.insert(0, nodes.ExprStmt(_call("tick"), lineno=loop.lineno))
        code = self._environment.compile(tree)
        return jinja2.Template.from_code(self._environment, code, self._environment.make_globals(None))


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, which also counts what a rendering takes."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, limits: RenderLimits) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self._limits = limits
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def start(self) -> None:
        self._deadline = time.monotonic() + self._limits.seconds

    def tick(self) -> None:
        """Called in every turn of a loop and for every call of a function or macro."""
        if time.monotonic() > self._deadline:
            raise RequestError(
                f"The model's chat template ran for more than {self._limits.seconds} seconds; send fewer messages or a "
                "plain prompt.",
                field="messages",
            )

    def check_size(self, num_characters: int) -> None:
        if num_characters > self._limits.characters:
            raise RequestError(
                f"The model's chat template wrote more than {self._limits.characters} characters; send fewer messages "
                "or a plain prompt.",
                field="messages",
            )

    def is_safe_callable(self, obj: Any) -> bool:
        self.tick()
        return super().is_safe_callable(obj)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            factor = right if operator == "**" else 1
            num_bits = left.bit_length() * factor + right.bit_length()
            if num_bits > _MAX_BITS:
                raise jinja2.exceptions.SecurityError(f"a number of {num_bits} bits is longer than {_MAX_BITS}")
        elif operator == "*":
            for count, repeated in ((left, right), (right, left)):
                if isinstance(count, int) and isinstance(repeated, str | list | tuple):
                    self.check_size(count * len(repeated))
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """`{% generation %}`, by which some templates mark what the model wrote; it changes nothing of the text."""

    tags = frozenset({"generation"})  # type: ignore[assignment]  # declared as a set, only ever read

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=lineno)


def _call(attribute: str) -> nodes.Call:
    """A call of an environment's method that no variable of the template can stand in for."""
    return nodes.Call(nodes.EnvironmentAttribute(attribute), [], [], None, None)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON, where Jinja's own filter would write `<` as an HTML escape."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    """A copy made of plain JSON types, without empty fields, because templates take a None for content."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RequestError("messages must be a list with at least one message.", field="messages")
    for position, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RequestError(
                f"messages[{position}] is a {type(message).__name__}; each must be an object with role and content.",
                field="messages",
            )
    try:
        plain = [{key: _plain(value) for key, value in message.items() if value is not None} for message in messages]
    except RecursionError as error:
        raise RequestError("messages are nested too deeply; send plain text or a list of parts.", "messages") from error
    return [_with_reasoning(message) for message in plain]


def _plain(value: Any) -> Any:
    """The same value in types whose methods cannot do harm; a template could call those of anything else."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise RequestError(
        f"messages hold a {type(value).__name__}; only text, numbers, lists and objects can be rendered.",
        field="messages",
    )


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Reasoning goes by three names; templates read one of two of them, whichever name it came under."""
    found = [message[key] for key in _REASONING_KEYS if message.get(key) is not None]
    return {"thinking": found[0], **message, "reasoning_content": found[0]} if found else message

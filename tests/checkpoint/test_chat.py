"""Chat templates: the same text as transformers renders, and an end to those that misbehave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from plexor.checkpoint.chat import ChatTemplate, RenderLimits
from plexor.errors import RequestError

NAMED = {"bos_token": "<s>", "eos_token": "</s>"}
USER = {"role": "user", "content": "How <b>are</b> you & yours?"}
HELLO = [USER]
LONG = [
    {"role": "system", "content": "  Be brief.\n"},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello", "reasoning": "A greeting."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
]
CALLED = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": {"at": "Ö<&"}}}]},
    {"role": "tool", "content": "rain"},
]

MARKED_TURNS = """
{%- for message in messages %}
{{- '<|' + message['role'] + '|>\n' }}
{%- if message.content is string %}
{{- message.content | trim }}
{%- elif message.content is defined %}
    {%- for part in message.content %}
        {%- if part.type == 'image' %}<image>{% elif 'text' in part %}{{ part.text }}{% endif %}
    {%- endfor %}
{%- endif %}
{{- eos_token + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- endif %}
"""
SYSTEM_FIRST = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
  {% set loop_messages = messages[1:] %}
  {% set system = messages[0].content.strip() %}
{% else %}
  {% set loop_messages = messages %}
  {% set system = false %}
{% endif %}
{% for message in loop_messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate: user, assistant, user, ...') }}
{% endif %}
{% if loop.first and system %}
[INST] {{ system }} | {{ message.content }} [/INST]
{% else %}
{{ loop.index }}: {{ message.content }}{{ eos_token }}
{% endif %}
{% endfor %}
"""
NAMESPACES = """
{%- macro show(call) -%}
<call>{{ call.function | tojson }}</call>{{ call.function.arguments | tojson(indent=2) }}
{%- endmacro -%}
{%- set ns = namespace(turns=0, last='') -%}
{%- for message in messages -%}
    {%- if message.role == 'tool' %}{% continue %}{% endif -%}
    {%- set ns.turns = ns.turns + 1 -%}
    {%- set ns.last = message.role -%}
    {%- if message.tool_calls is defined and message.tool_calls -%}
        {%- for call in message.tool_calls %}{{ show(call) }}{% endfor -%}
    {%- elif message.content is string -%}
        {{ message.content.split('<b>')[0] ~ '|' }}
    {%- endif -%}
    {%- if ns.turns >= 3 %}{% break %}{% endif -%}
{%- endfor -%}
{{ ns.turns }} {{ ns.last }} {{ messages | length }} {{ messages | map(attribute='role') | join(',') }}
{% if tools is none and documents is none and unknown is not defined %}no tools{% endif %}
{{ '=' * 5 }} {{ 2 ** 10 }} {{ dict(a=1).items() | list }} {{ pad_token is defined }} {{ '%s' | format('x') }}
"""
GENERATION = """{% for message in messages %}
{% if message.role == 'assistant' %}
{% generation %}{{ message.reasoning_content }}/{{ message.thinking }}/{{ message.content }}
{{ eos_token }}{% endgeneration %}
{% else %}
{{ message.role }}
{% endif %}
{% endfor %}"""
STRICT = "{% for message in messages %}{{ message.content + '!' }}{% endfor %}"
TEMPLATES = [MARKED_TURNS, SYSTEM_FIRST, NAMESPACES, GENERATION, STRICT]


@pytest.fixture(scope="module")
def peer() -> Any:
    """The renderer of transformers over a tokenizer that is nothing but named tokens."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "x": 2}, unk_token="x"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **NAMED)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("messages", [HELLO, LONG, CALLED], ids=["hello", "long", "called"])
@pytest.mark.parametrize("template", TEMPLATES, ids=["turns", "system", "namespaces", "generation", "strict"])
def test_renders_as_transformers_does(
    peer: Any, template: str, messages: list[dict[str, Any]], add_generation_prompt: bool
) -> None:
    expected, refused = answer_of(
        lambda: peer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    )
    found, error = answer_of(
        lambda: ChatTemplate(template, NAMED).render(messages, add_generation_prompt=add_generation_prompt)
    )
    assert found == expected
    assert (error is None) == (refused is None)
    if refused is not None:  # what it refuses, we refuse, with the same words
        assert isinstance(error, RequestError)
        assert error.field == "messages"
        assert " ".join(str(refused).split()) in str(error)


def answer_of(render: Callable[[], str]) -> tuple[str | None, Exception | None]:
    try:
        return render(), None
    except Exception as error:
        return None, error


def test_comparison_covers_both_answers_and_refusals() -> None:
    """Guards the test above against cases that all end in the same branch."""
    assert ChatTemplate(SYSTEM_FIRST, NAMED).render(HELLO).startswith("<s>1: How <b>")
    with pytest.raises(RequestError, match="Roles must alternate"):
        ChatTemplate(SYSTEM_FIRST, NAMED).render([USER, USER])


def test_the_date_is_at_hand() -> None:
    year = ChatTemplate("{{ strftime_now('%Y') }}", {}).render(HELLO)
    assert len(year) == 4
    assert year.isdigit()


def test_template_is_used_again() -> None:
    template = ChatTemplate("{{ messages[0].content }}", {})
    assert [template.render([{"role": "user", "content": text}]) for text in "ab"] == ["a", "b"]


MANY = "{% for a in range(99999) %}{% for b in range(99999) %}{% if a > b %}{% endif %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        MANY,
        "{% set r = range(99999) | list %}" + MANY.replace("range(99999)", "r"),
        "{% set x %}" + MANY + "{% endset %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% macro f() %}" + MANY + "{% endmacro %}{{ f() }}",
        "{% filter upper %}" + MANY + "{% endfilter %}",
    ],
    ids=["loops", "lists", "set", "macros", "loops in a macro", "loops in a filter"],
)
def test_endless_template_is_stopped(template: str) -> None:
    limits = RenderLimits(seconds=0.2)
    with pytest.raises(RequestError, match=r"ran for more than 0\.2 seconds"):
        ChatTemplate(template, {}, limits=limits).render(HELLO)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(1000) %}{{ 'x' * 100 }}{% endfor %}",
        "{{ 'x' * 1000000000 }}",
        "{{ 1000000000 * messages }}",
    ],
)
def test_endless_text_is_stopped(template: str) -> None:
    limits = RenderLimits(seconds=60, characters=5000)
    with pytest.raises(RequestError, match="wrote more than 5000 characters"):
        ChatTemplate(template, {}, limits=limits).render(HELLO)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 10 ** (10 ** 10) }}", "longer than 4096"),
        (
            "{% set ns = namespace(x=7) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
            "longer than",
        ),
        ("{% for x in %}", r"not valid Jinja .* line 1"),
        ("{{ messages.append(1) }}", "refuses these messages"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ range(10 ** 9) }}", "refuses these messages"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% include 'other' %}", "refuses these messages"),
        ("{{ messages[0].missing.deeper }}", "has no attribute 'missing'"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ raise_exception('only\none turn') }}", "only one turn"),
    ],
)
def test_failing_template_is_a_refused_request(template: str, reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as caught:
        ChatTemplate(template, {}).render(HELLO)
    assert caught.value.field == "messages"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "at least one message"),
        ("Hi", "at least one message"),
        ({"role": "user"}, "at least one message"),
        (["Hi"], r"messages\[0\] is a str"),
        ([USER, None], r"messages\[1\] is a NoneType"),
        ([{"role": "user", "content": object()}], "hold a object"),
        ([{"role": "user", "content": b"x"}], "hold a bytes"),
    ],
)
def test_wrong_messages_name_the_field(messages: Any, reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as caught:
        ChatTemplate("{{ messages }}", {}).render(messages)
    assert caught.value.field == "messages"


def test_bottomless_message() -> None:
    content: list[Any] = []
    for _ in range(100_000):
        content = [content]
    with pytest.raises(RequestError, match="nested too deeply"):
        ChatTemplate("x", {}).render([{"role": "user", "content": content}])
    while content:  # taken apart step by step, because freeing it at once would recurse as deep
        content = content.pop()

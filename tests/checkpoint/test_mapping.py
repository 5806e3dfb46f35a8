"""Rules: which tensor goes where, and what a place is called in the checkpoint."""

from __future__ import annotations

from plexor.checkpoint.mapping import Ignore, Rule, RuleBook, under
from plexor.checkpoint.view import Rows

RULES = (
    Rule("model.layers.{layer}.q_proj", "layers.{layer}.qkv", part=0),
    Rule("model.layers.{layer}.k_proj", "layers.{layer}.qkv", part=1),
    Rule("model.layers.{layer}.experts.{expert}.up", "layers.{layer}.experts.up", group="expert"),
    Rule("model.query", "reader", tensor="query"),
    Ignore("model.layers.{layer}.mask"),
)


def places(book: RuleBook, name: str) -> list[tuple[str, str, int]]:
    return [(match.target, match.tensor, match.group) for match in book.match(name)]


def test_a_rule_carries_a_modules_tensors_with_their_last_name() -> None:
    book = RuleBook(RULES)
    assert places(book, "model.layers.11.k_proj.bias") == [("layers.11.qkv", "bias", 0)]
    assert [match.rule for match in book.match("model.layers.0.k_proj.weight")] == [RULES[1]]


def test_only_whole_names_and_numbers_match() -> None:
    book = RuleBook(RULES)
    strangers = (
        "model.layers.0.k_proj",
        "model.layers.x.k_proj.weight",
        "model.layers.0.k_proj.weight.scale",
        "other.model.layers.0.k_proj.weight",
        "modelXlayers.0.k_proj.weight",
        "model.layers.0.mask.weight",
        "model.query.weight",
    )
    assert [name for name in strangers if book.match(name)] == []


def test_one_tensor_by_its_full_name() -> None:
    assert places(RuleBook(RULES), "model.query") == [("reader", "query", 0)]


def test_a_group_is_numbered_by_its_placeholder() -> None:
    assert places(RuleBook(RULES), "model.layers.2.experts.7.up.weight") == [("layers.2.experts.up", "weight", 7)]


def test_an_ignored_tensor_matches_without_a_place() -> None:
    (match,) = RuleBook(RULES).match("model.layers.3.mask")
    assert isinstance(match.rule, Ignore)


def test_a_fused_tensor_matches_once_for_each_part() -> None:
    fused = tuple(Rule("qkv", "qkv", part=part, steps=(Rows(part, part + 1, 3),)) for part in range(3))
    found = [match.rule for match in RuleBook(fused).match("qkv.weight")]
    assert found == list(fused)


def test_places_are_named_as_the_checkpoint_would() -> None:
    book = RuleBook(RULES)
    assert book.source_of("layers.4.qkv", 1, 0, "bias") == "model.layers.4.k_proj.bias"
    assert book.source_of("layers.4.experts.up", 0, 3, "weight") == "model.layers.4.experts.3.up.weight"
    assert book.source_of("reader", 0, 0, "query") == "model.query"
    assert book.source_of("layers.4.qkv", 2, 0, "weight") == "layers.4.qkv.weight"


def test_rules_move_below_a_prefix_and_a_place() -> None:
    book = RuleBook(under("language_model", "language", RULES))
    assert places(book, "language_model.model.layers.1.q_proj.weight") == [("language.layers.1.qkv", "weight", 0)]
    assert places(book, "language_model.model.query") == [("language.reader", "query", 0)]
    assert isinstance(book.match("language_model.model.layers.1.mask")[0].rule, Ignore)
    assert book.match("model.layers.1.q_proj.weight") == ()


def test_either_place_may_be_the_top_level() -> None:
    assert under("", "", RULES) == RULES
    assert under("inner", "", RULES[:1]) == (Rule("inner.model.layers.{layer}.q_proj", "layers.{layer}.qkv"),)
    assert under("model", "whole", (Rule("", ""),)) == (Rule("model", "whole"),)

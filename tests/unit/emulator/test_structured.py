"""Texts that satisfy their constraints, whatever comes before them; constraints that are refused."""

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emulator.structured import ConstraintError, parse_constraint
from emulator.structured.picker import MAX_CHARS

PROMPTS = st.binary(max_size=20)
_ATOMS = st.sampled_from(["a", "xyz", ".", "\\d", "\\w", "\\S", "[a-f]", "[^0-9]", "[\\d_-]", "\\.", "\\x41", "é"])
_PATTERNS = st.recursive(
    _ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"({pair[0]}|{pair[1]})"),
        inner.map(lambda one: f"(?:{one})*"),
        inner.map(lambda one: f"({one})+?"),
        inner.map(lambda one: f"(?P<name>{one})?" if "name" not in one else f"({one})?"),
        inner.map(lambda one: f"({one}){{2,4}}"),
        inner.map(lambda one: f"({one}){{3}}"),
    ),
    max_leaves=6,
)


def text_of(structured: dict[str, Any], before: bytes = b"", choice: int = 0) -> str:
    constraint = parse_constraint(structured, None)
    assert constraint is not None
    text = constraint.text(before, choice)
    assert text is not None
    return text


@given(_PATTERNS, PROMPTS, st.integers(0, 3))
def test_text_matches_its_regex(pattern: str, before: bytes, choice: int) -> None:
    usable = pattern.replace("(?P<name>", "(", max(0, pattern.count("(?P<name>") - 1))
    text = text_of({"regex": usable}, before, choice)
    assert re.fullmatch(usable, text), (usable, text)


@pytest.mark.parametrize(
    "pattern",
    ["[0-9", "(a", "a)", "*a", "a{2,1}", "[z-a]", "(?=a)b", "(?i)a", "\\1", "\\b", "a\\", "[]", "\\xzz"],
)
def test_other_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(ConstraintError):
        parse_constraint({"regex": pattern}, None)


@pytest.mark.parametrize("pattern", ["((a{1000}){1000}){1000}", "(){999999999}", "(" * 200 + "a" + ")" * 200])
def test_work_and_length_are_bounded(pattern: str) -> None:
    with pytest.raises(ConstraintError):
        parse_constraint({"regex": pattern}, None)
    assert MAX_CHARS < 10**5


@given(PROMPTS, st.integers(0, 8))
def test_the_rest_of_a_regex_goes_on_with_the_same_text(before: bytes, cut: int) -> None:
    whole = text_of({"regex": "[0-9]{3}-[a-z]{5}"}, before)
    rests = [f"[0-9]{{{3 - cut}}}-[a-z]{{5}}" if cut < 3 else "-[a-z]{5}" if cut == 3 else f"[a-z]{{{9 - cut}}}"]
    assert text_of({"regex": rests[0]}, before + whole[:cut].encode()) == whole[cut:]


@given(PROMPTS, st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=5), st.data())
def test_a_choice_is_made_and_its_rest_leads_there(before: bytes, offered: list[str], data: st.DataObject) -> None:
    made = text_of({"choice": offered}, before)
    assert made in offered
    cut = data.draw(st.integers(0, len(made)))
    left = [text[cut:] for text in offered if text.startswith(made[:cut])]
    assert text_of({"choice": left}, before + made[:cut].encode("utf-8", "replace")) == made[cut:]


@pytest.mark.parametrize(
    ("schema", "fits"),
    [
        ({"type": "integer", "minimum": 3, "maximum": 3}, lambda value: value == 3),
        ({"type": "integer", "exclusiveMinimum": 4.5, "multipleOf": 3}, lambda value: value >= 6 and value % 3 == 0),
        ({"type": "number", "exclusiveMaximum": -1}, lambda value: value < -1),
        ({"type": "string", "minLength": 5}, lambda value: len(value) >= 5),
        ({"type": "string", "maxLength": 1}, lambda value: len(value) <= 1),
        ({"type": "string", "pattern": "^[A-Z]{2}[0-9]$"}, lambda value: re.fullmatch("[A-Z]{2}[0-9]", value)),
        ({"type": "string", "format": "date"}, lambda value: re.fullmatch(r"\d{4}-\d\d-\d\d", value)),
        ({"enum": ["a", 2, None]}, lambda value: value in ("a", 2, None)),
        ({"const": {"x": [1]}}, lambda value: value == {"x": [1]}),
        ({"type": ["null", "boolean"]}, lambda value: value is False),
        ({"anyOf": [{"type": "integer", "minimum": 9, "maximum": 1}, {"type": "null"}]}, lambda value: value is None),
        ({"allOf": [{"required": ["a"]}, {"properties": {"a": {"type": "null"}}}]}, lambda value: value == {"a": None}),
        ({"type": "array", "minItems": 2, "prefixItems": [{"type": "null"}], "items": {"const": 1}},
         lambda value: value == [None, 1]),
        ({"properties": {"b": {"type": "boolean"}, "c": {"type": "null"}}, "minProperties": 1},
         lambda value: value == {"b": False}),
        ({"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}}}}},
         lambda value: value == {}),
        ("{\"type\": \"boolean\"}", lambda value: value is False),
        (True, lambda value: value == {}),
    ],
)  # fmt: skip
def test_objects_fit_their_schema(schema: Any, fits: Any) -> None:
    for before in (b"", b"x", b"yz"):
        assert fits(json.loads(text_of({"json": schema}, before)))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "zzz"},
        {"type": "integer", "minimum": 5, "maximum": 4},
        {"enum": []},
        {"$ref": "http://elsewhere"},
        {"$ref": "#/$defs/none"},
        {"$ref": "#"},
        {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        {"type": "object", "properties": 3},
        {"type": "array", "minItems": 10**9},
        {"type": "string", "minLength": 10**9},
        {"type": "string", "minLength": "x"},
        {"anyOf": 3},
        3,
        "{",
        " ",
    ],
)
def test_impossible_and_malformed_schemas_are_refused(schema: Any) -> None:
    with pytest.raises(ConstraintError):
        parse_constraint({"json": schema}, None)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "type",
                        "properties",
                        "required",
                        "items",
                        "minItems",
                        "enum",
                        "anyOf",
                        "allOf",
                        "$ref",
                        "pattern",
                        "a",
                    ]
                ),
                inner,
                max_size=3,
            )
        ),
        max_leaves=12,
    )
)
def test_any_schema_is_refused_or_gives_json(schema: Any) -> None:
    try:
        text = text_of({"json": schema}) if schema is not None else "{}"
    except ConstraintError:
        return
    json.loads(text)


def test_response_format_comes_first_and_free_kinds_are_accepted() -> None:
    chosen = parse_constraint({"regex": "a"}, {"type": "json_object"})
    assert chosen is not None
    assert isinstance(json.loads(chosen.text(b"") or ""), dict)
    assert parse_constraint({"regex": "a"}, {"type": "text"}).text(b"") == "a"  # type: ignore[union-attr]
    assert parse_constraint(None, None) is None
    grammar = parse_constraint({"grammar": 'root ::= "a"'}, None)
    assert grammar is not None
    assert grammar.text(b"") is None
    tag = {"type": "structural_tag", "structures": [], "triggers": []}
    assert parse_constraint(None, tag).text(b"") is None  # type: ignore[union-attr]

"""JSON Schemas: a fast answer whether a document obeys one, and which rule it breaks if not.

The reports of large runs have 100,000 cases. `jsonschema` takes minutes for them, so a schema
becomes a tree of Python functions. Only for a document that these refuse, `jsonschema` finds the
place and the rule.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError, best_match
from jsonschema.validators import extend

Check: TypeAlias = Callable[[Any], bool]

_DEEPEST = 40  # levels of lists and objects
_ANNOTATIONS = {"$schema", "$defs", "title", "description"}


class Schema:
    """A JSON Schema (draft 2020-12) of a part of its keywords; others raise at once.

    Args:
        document: the schema. `$ref` names a part of the same document.
    """

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self._refs: dict[str, Check] = {}
        self._check = self._compiled(document)

    def violation(self, value: Any) -> str | None:
        """Which rule a value breaks, as "PLACE: RULE", or None."""
        if _too_deep(value):
            return f"must have at most {_DEEPEST} levels of lists and objects"
        if self._check(value):
            return None
        found = best_match(_Validator(self.document).iter_errors(value))
        if found is None:
            return "is not valid"
        place = found.json_path.removeprefix("$").removeprefix(".")
        return shorten(f"{shorten(place, 100)}: " if place else "", 110) + shorten(found.message)

    def _compiled(self, schema: dict[str, Any]) -> Check:
        checks = [
            getattr(self, f"_of_{keyword.lstrip('$')}")(rule, schema)
            for keyword, rule in schema.items()
            if keyword not in _ANNOTATIONS
        ]
        if len(checks) == 1:
            only: Check = checks[0]
            return only
        return lambda value: all(check(value) for check in checks)

    def _of_ref(self, place: str, _: Any) -> Check:
        if place not in self._refs:
            self._refs[place] = lambda value: self._refs[place](value)  # for a part within itself
            part: Any = self.document
            for name in place.removeprefix("#/").split("/"):
                part = part[name]
            self._refs[place] = self._compiled(part)
        return self._refs[place]

    def _of_type(self, names: Any, _: Any) -> Check:
        types = tuple(_TYPES[name] for name in ([names] if isinstance(names, str) else names))
        if len(types) == 1:
            return types[0]
        return lambda value: any(is_type(value) for is_type in types)

    def _of_enum(self, allowed: list[Any], _: Any) -> Check:
        kinds = {(type(one), one) for one in allowed}
        return lambda value: _is_scalar(value) and (type(value), value) in kinds

    def _of_const(self, allowed: Any, schema: Any) -> Check:
        return self._of_enum([allowed], schema)

    def _of_pattern(self, pattern: str, _: Any) -> Check:
        found = _regex(pattern).search
        return lambda value: not isinstance(value, str) or found(value) is not None

    def _of_maxLength(self, limit: int, _: Any) -> Check:
        return lambda value: not isinstance(value, str) or len(value) <= limit

    def _of_minLength(self, limit: int, _: Any) -> Check:
        return lambda value: not isinstance(value, str) or len(value) >= limit

    def _of_minimum(self, limit: float, _: Any) -> Check:
        return lambda value: not _is_number(value) or value >= limit

    def _of_exclusiveMinimum(self, limit: float, _: Any) -> Check:
        return lambda value: not _is_number(value) or value > limit

    def _of_maximum(self, limit: float, _: Any) -> Check:
        return lambda value: not _is_number(value) or value <= limit

    def _of_maxItems(self, limit: int, _: Any) -> Check:
        return lambda value: not isinstance(value, list) or len(value) <= limit

    def _of_minItems(self, limit: int, _: Any) -> Check:
        return lambda value: not isinstance(value, list) or len(value) >= limit

    def _of_uniqueItems(self, _: bool, __: Any) -> Check:
        return lambda value: (
            not isinstance(value, list) or len({json.dumps(one) for one in value}) == len(value)
        )

    def _of_prefixItems(self, parts: list[Any], _: Any) -> Check:
        checks = [self._compiled(part) for part in parts]
        return lambda value: (
            not isinstance(value, list)
            or all(check(one) for check, one in zip(checks, value, strict=False))
        )

    def _of_items(self, part: Any, _: Any) -> Check:
        check = self._compiled(part)
        return lambda value: not isinstance(value, list) or all(check(one) for one in value)

    def _of_oneOf(self, parts: list[Any], _: Any) -> Check:
        checks = [self._compiled(part) for part in parts]
        return lambda value: sum(check(value) for check in checks) == 1

    def _of_required(self, names: list[str], _: Any) -> Check:
        return lambda value: not isinstance(value, dict) or all(name in value for name in names)

    def _of_maxProperties(self, limit: int, _: Any) -> Check:
        return lambda value: not isinstance(value, dict) or len(value) <= limit

    def _of_propertyNames(self, part: Any, _: Any) -> Check:
        check = self._compiled(part)
        return lambda value: not isinstance(value, dict) or all(check(name) for name in value)

    def _of_properties(self, parts: dict[str, Any], _: Any) -> Check:
        checks = {name: self._compiled(part) for name, part in parts.items()}
        return lambda value: (
            not isinstance(value, dict)
            or all(name not in checks or checks[name](one) for name, one in value.items())
        )

    def _of_additionalProperties(self, part: Any, schema: Any) -> Check:
        named = set(schema.get("properties", ()))
        check: Check = (lambda value: False) if part is False else self._compiled(part)
        return lambda value: (
            not isinstance(value, dict)
            or all(name in named or check(one) for name, one in value.items())
        )


def parse(text: bytes) -> Any:
    """The value of a JSON text in UTF-8.

    Raises:
        ValueError: the text is no JSON, or has NaN, infinity, a name twice in an object, or too
            many levels.
    """
    try:
        return json.loads(text.decode(), parse_constant=_refuse, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("it has too many levels of lists and objects") from None


def shorten(message: str, width: int = 300) -> str:
    """The message without its middle; jsonschema puts the value first and the rule last."""
    half = width // 2
    return message if len(message) <= width else f"{message[:half]} ... {message[-half:]}"


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {shorten(twice, 60)!r} is twice in an object")
    return found


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(level)


def _regex(pattern: str) -> re.Pattern[str]:
    """A pattern in which `$` is the end, as in JSON Schema; in Python a line feed may follow."""
    return re.compile(re.sub(r"\$$", r"\\Z", pattern))


def _matches(_: Any, pattern: str, value: Any, __: Any) -> Iterator[ValidationError]:
    if isinstance(value, str) and not _regex(pattern).search(value):
        yield ValidationError(f"{value!r} does not match {pattern!r}")


def _is_number(value: object) -> bool:
    """Whether JSON can write it as a number, unlike NaN, infinity and NumPy's scalars."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_scalar(value: object) -> bool:
    return value is None or isinstance(value, (str, int, float, bool))


_TYPES: dict[str, Check] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "number": _is_number,
    "integer": _is_integer,
}

_Validator = extend(
    Draft202012Validator,
    {"pattern": _matches},
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine_many(
        {
            "number": lambda _, value: _is_number(value),
            "integer": lambda _, value: _is_integer(value),
        }
    ),
)

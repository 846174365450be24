"""The product of a certificate: a small JSON file that its vendor writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from syncbn.conformance import ConformanceError
from syncbn.reports.schema import Schema, parse

_PATH = Path(__file__).parent.parent / "schema" / "product-1.json"
SCHEMA = Schema(json.loads(_PATH.read_bytes()))
_LARGEST = 100_000  # bytes


class ProductError(ConformanceError):
    """A file that describes no product. The message is one line."""


def load(path: Path) -> dict[str, Any]:
    """The product that a JSON file describes; schema/product-1.json lists its fields.

    Raises:
        ProductError: with the place and the rule.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST + 1)
        if len(text) > _LARGEST:
            raise ProductError(f"product {path} must have at most {_LARGEST} bytes")
        product = parse(text)
    except OSError as error:
        raise ProductError(f"cannot read product {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ProductError(f"product {path} is not JSON: {error}") from error
    if violation := SCHEMA.violation(product):
        raise ProductError(f"product {path}: {violation}")
    found: dict[str, Any] = product
    return found

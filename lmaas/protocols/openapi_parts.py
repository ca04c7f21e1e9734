"""The small JSON schemas of which the protocols' parts of the OpenAPI document are made."""

from collections.abc import Collection
from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
FLAG: Schema = {"type": "boolean"}
OBJECT: Schema = {"type": "object"}
MAYBE_TEXT: Schema = {"type": ["string", "null"]}
MAYBE_OBJECT: Schema = {"type": ["object", "null"]}
IDS: Schema = {"type": "array", "items": COUNT}


def closed(optional: Collection[str] = (), **properties: Schema) -> Schema:
    """Return the schema of an object that has these properties and no others."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def content(name: str) -> Schema:
    """Return the content of a JSON body with this schema of the document."""
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}

"""What the OpenAPI document says of bodies that the routes read themselves."""

from __future__ import annotations

from typing import Any

__all__ = ["IMAGES_BODY", "INFER_BODY", "TOP_K"]

Schema = dict[str, Any]


def _object(*required: str, **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties} | ({"required": list(required)} if required else {})


def _list(items: Schema, **limits: int) -> Schema:
    return {"type": "array", "items": items, **limits}


def _body(schemas: Schema) -> Schema:
    content = {kind: {"schema": schema} for kind, schema in schemas.items()}
    return {"requestBody": {"required": True, "content": content}}


_FILE: Schema = {"type": "string", "format": "binary"}
_BASE64: Schema = {"type": "string", "format": "byte"}
_COUNT: Schema = {"type": "integer", "minimum": 1, "maximum": 999_999}
_TEXT: Schema = {"type": "string"}
_TENSOR = _object(
    "name", "shape", "datatype", "data",
    name=_TEXT, datatype=_TEXT, shape=_list({"type": "integer"}), data=_list({"type": "number"}),
)  # fmt: skip
TOP_K: Schema = {"name": "top_k", "in": "query", "required": False, "schema": _COUNT}
IMAGES_BODY = _body({
    "multipart/form-data": _object("image", image=_list(_FILE), top_k=_COUNT),
    "application/json": _object(image=_BASE64, images=_list(_BASE64), top_k=_COUNT) | {"additionalProperties": False},
    "application/octet-stream": _FILE,
    "image/*": _FILE,
})  # fmt: skip
INFER_BODY = _body({
    "application/json": _object("inputs", id=_TEXT, inputs=_list(_TENSOR, minItems=1, maxItems=1)),
})  # fmt: skip

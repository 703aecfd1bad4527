"""What the OpenAPI document says of bodies that the routes read themselves."""

from __future__ import annotations

from typing import Any, Final

__all__ = ["IMAGES_BODY", "INFER_BODY", "TOP_K"]

_FILE: Final[dict[str, Any]] = {"type": "string", "format": "binary"}
_COUNT: Final[dict[str, Any]] = {"type": "integer", "minimum": 1, "maximum": 999_999}
TOP_K: Final[dict[str, Any]] = {"name": "top_k", "in": "query", "required": False, "schema": _COUNT}
IMAGES_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object", "required": ["image"],
                    "properties": {"image": {"type": "array", "items": _FILE}, "top_k": _COUNT},
                }
            },
            "application/json": {
                "schema": {
                    "type": "object", "additionalProperties": False,
                    "properties": {
                        "image": {"type": "string", "format": "byte"},
                        "images": {"type": "array", "items": {"type": "string", "format": "byte"}},
                        "top_k": _COUNT,
                    },
                }
            },
            "application/octet-stream": {"schema": _FILE},
            "image/*": {"schema": _FILE},
        },
    }
}  # fmt: skip
INFER_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object", "required": ["inputs"],
                    "properties": {
                        "id": {"type": "string"},
                        "inputs": {
                            "type": "array", "minItems": 1, "maxItems": 1,
                            "items": {
                                "type": "object", "required": ["name", "shape", "datatype", "data"],
                                "properties": {
                                    "name": {"type": "string"}, "datatype": {"type": "string"},
                                    "shape": {"type": "array", "items": {"type": "integer"}},
                                    "data": {"type": "array", "items": {"type": "number"}},
                                },
                            },
                        },
                    },
                }
            }
        },
    }
}  # fmt: skip

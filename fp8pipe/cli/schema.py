"""`fp8pipe schema` prints the JSON schema of recipes, which editors use to complete and check them."""

from __future__ import annotations

import json
from typing import Any

import click

from fp8pipe.cli.common import Console, common_options


@click.command("schema")
@common_options()
def schema_command(console: Console) -> None:
    """Print the JSON schema (2020-12) of recipes.

    In an editor with YAML support: `# yaml-language-server: $schema=recipe.schema.json` as a recipe's first line.
    """
    schema = recipe_schema()
    console.emit(schema, json.dumps(schema, indent=2))


def recipe_schema() -> dict[str, Any]:
    """The schema as a dictionary."""
    from fp8pipe.cli.stages import stage_schemas
    from pipeline.workflow import GateSpec, Resources

    definitions: dict[str, Any] = {}
    stages = []
    for name, schema in stage_schemas().items():
        definitions.update(schema.pop("$defs", {}))
        properties = {"command": {"const": name.split()[0]}, **_COMMON, **schema["properties"]}
        stages.append(
            {
                "title": name, "type": "object", "properties": properties, "additionalProperties": False,
                "required": ["command", *schema.get("required", ())],
            }
        )  # fmt: skip
    gate = GateSpec.model_json_schema()
    definitions["Gate"] = gate
    definitions["Resources"] = Resources.model_json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema", "title": "recipe of fp8pipe run", "type": "object",
        "additionalProperties": False, "required": ["stages"],
        "properties": {
            "name": {"type": "string"}, "description": {"type": "string"},
            "stages": {
                "type": "object", "minProperties": 1, "additionalProperties": {"anyOf": stages},
                "propertyNames": {"pattern": "^[a-z0-9][a-z0-9-]{0,62}$"},
            },
        },
        "$defs": definitions,
    }  # fmt: skip


_COMMON = {
    "gates": {"type": "array", "items": {"$ref": "#/$defs/Gate"}, "description": "conditions on the stage's output"},
    "after": {"type": "array", "items": {"type": "string"}, "description": "stages that must finish first"},
    "resources": {"$ref": "#/$defs/Resources"},
}

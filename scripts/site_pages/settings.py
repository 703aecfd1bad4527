"""The pages of recipes, settings and manifests, written from the models that validate them."""

from __future__ import annotations

import re

from exporters.target import targets
from fp8pipe.artifact.kinds import TUNED_KINDS, VIT_KIND, kind_named
from fp8pipe.artifact.manifest import Manifest
from fp8pipe.cli.schema import recipe_schema
from fp8pipe.cli.stages import stage_schemas
from site_pages.tables import code, schema_section, table

__all__ = ["manifest_page", "recipe_page", "settings_page"]

_RECIPE = """# Keys of recipes

A recipe is a YAML file that `fp8pipe run` takes. Unknown keys are refused. `fp8pipe schema` prints all of this as a
JSON schema, with which editors complete and check recipes.

"""
_SETTINGS = """# Settings

The settings of each command that reads `--config FILE`, and of each stage of a recipe. Unknown keys are refused, with
the key that was probably meant. Options on the command line take precedence over the file.

"""
_MANIFEST = """# Fields of manifests

`manifest.json` of every artifact.

"""
_DETAILS = """## Details

The fields of `details`, which depend on the kind of the artifact.

"""


def recipe_page() -> str:
    """Keys of a recipe, of any stage, of gates and resources; and which settings each command requires."""
    schema = recipe_schema()
    text = _RECIPE + schema_section("The file", schema, 2, set(schema["$defs"]))
    first = schema["properties"]["stages"]["additionalProperties"]["anyOf"][0]
    common = {name: first["properties"][name] for name in ("command", "gates", "after", "resources")}
    common["command"] = {"type": "string", "description": "the command to run; one of those below"}
    stage = {"properties": common, "required": ["command"], "$defs": schema["$defs"]}
    text += schema_section("A stage", stage, 2, set())
    rows = []
    for one in schema["properties"]["stages"]["additionalProperties"]["anyOf"]:
        required = [name for name in one["required"] if name != "command"]
        command = one["properties"]["command"]["const"]
        fixed = one["properties"].get("target", {}).get("const", "")
        link = f"[settings](settings.md#{_anchor(one['title'])})"
        rows.append((code(command), code(fixed), ", ".join(map(code, required)), link))
    return text + "## Commands\n\n" + table(("command", "target", "required", "all settings"), rows)


def settings_page() -> str:
    """The settings of all commands; a group of settings that several share is shown once."""
    seen: set[str] = set()
    schemas = stage_schemas()
    text = _SETTINGS + "".join(f"* [{name}](#{_anchor(name)})\n" for name in schemas) + "\n"
    return text + "".join(schema_section(name, schema, 2, seen) for name, schema in schemas.items())


def manifest_page() -> str:
    """Fields of the manifest, and the details of each kind."""
    seen = {"Details"}
    models = {f"Details of {name}": kind_named(name).details
              for name in (*TUNED_KINDS, VIT_KIND, *(target.kind for target in targets()))}  # fmt: skip
    text = _MANIFEST + schema_section("manifest.json", Manifest.model_json_schema(mode="serialization"), 2, seen)
    return (
        text
        + _DETAILS
        + "".join(
            schema_section(title, model.model_json_schema(mode="serialization"), 3, seen)
            for title, model in models.items()
        )
    )


def _anchor(heading: str) -> str:
    """As GitHub, and the site's table of contents, make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")

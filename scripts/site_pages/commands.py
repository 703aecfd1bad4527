"""The page of all commands, written from click's tree: arguments, options, values, what they mean."""

from __future__ import annotations

import inspect
import re

import click

from fp8pipe.cli import COMMANDS, main
from site_pages.tables import cell, code, table

__all__ = ["commands_page"]

_HEAD = """# Commands and options

What `fp8pipe COMMAND --help` prints, for all commands. {group}

"""


def commands_page() -> str:
    """The whole page."""
    above = click.Context(main, info_name="fp8pipe")
    group = " ".join(inspect.cleandoc(main.help or "").split("\n\n")[1].split())
    rows = [(f"[`{name}`](#fp8pipe-{name})", cell(short)) for name, short in COMMANDS.items()]
    return (
        _HEAD.format(group=group)
        + table(("command", "what it does"), rows)
        + "".join(_section(name, above) for name in COMMANDS)
    )


def _section(name: str, above: click.Context) -> str:
    command = main.get_command(above, name)
    assert command is not None
    context = click.Context(command, info_name=name, parent=above)
    usage = " ".join(command.collect_usage_pieces(context))
    rows = [
        (", ".join(code(flag) for flag in (*one.opts, *one.secondary_opts)), _value(one, context), cell(_meaning(one)))
        for one in command.params
        if isinstance(one, click.Option) and not one.hidden
    ]
    text = f"\n## fp8pipe {name}\n\n```text\nfp8pipe {name} {usage}\n```\n\n{_help(command)}\n\n"
    return text + table(("option", "value", "meaning"), rows)


def _help(command: click.Command) -> str:
    """The command's docstring; paragraphs that click prints line by line become fences."""
    found = []
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        if paragraph.startswith("\b"):
            found.append("```text\n" + paragraph.removeprefix("\b").strip("\n") + "\n```")
        else:
            found.append(re.sub(r"<(?=\w)", r"\\<", paragraph))
    return "\n\n".join(found)


def _value(option: click.Option, context: click.Context) -> str:
    if option.is_flag or option.count:
        return ""
    if isinstance(option.type, click.Choice):
        return ", ".join(code(getattr(choice, "value", choice)) for choice in option.type.choices)
    return code(option.make_metavar(context)) + (", several times" if option.multiple else "")


def _meaning(option: click.Option) -> str:
    words = [option.help or ""]
    if option.required:
        words.append("Required.")
    if option.envvar:
        words.append(f"Also read from the environment variable `{option.envvar}`.")
    return " ".join(words)

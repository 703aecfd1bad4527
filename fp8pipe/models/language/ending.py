"""Finds the token with which a chat template ends an answer, and checks that engines stop at it.

A fine-tuned model learns to end its answers with the end-of-turn token of its chat template. An engine stops at the
tokenizer's `eos_token` and at `eos_token_id` of generation_config.json (of config.json if that file is absent). A
base model with another model's chat template often lists the template's end-of-turn token in neither: the model then
emits that token, and the engine keeps generating. This module renders a finished turn and reads the token after it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fp8pipe.core.errors import class_and_one_line
from fp8pipe.models.checkpoint.sidecars import read_config
from fp8pipe.models.compat import import_transformers
from fp8pipe.models.language.text import TemplateInfo, template_info
from fp8pipe.models.language.text.template import in_parts

GENERATION_FILE: Final = "generation_config.json"
EOS: Final = "eos_token_id"
_ANSWER: Final = "The answer is forty-two"
_TALK: Final = ({"role": "user", "content": "What is the answer?"}, {"role": "assistant", "content": _ANSWER})


@dataclass(frozen=True, slots=True)
class Ending:
    """How a model ends its turns.

    Attributes:
        token: id of the end-of-turn token; None if there is none or it cannot be determined.
        settings: content of generation_config.json that makes engines stop at `token`; None if no change is needed.
        warning: a message for the user; empty if engines stop at `token` without a change.
    """

    token: int | None = None
    settings: dict[str, Any] | None = None
    warning: str = ""

    @property
    def added(self) -> int | None:
        """The end-of-turn token, if it has to be added to generation_config.json."""
        return None if self.settings is None else self.token

    @property
    def text(self) -> str:
        """`settings` as JSON, the text of generation_config.json."""
        return json.dumps(self.settings, indent=2, ensure_ascii=False) + "\n"

    def warnings(self, labels: Iterable[Sequence[int]] | None = None) -> list[str]:
        """Warnings for the user.

        Args:
            labels: label token ids of each training example; if given, a warning is added when none of the examples
                contains the end-of-turn token.
        """
        found = [self.warning] if self.warning else []
        if labels is not None and self.token is not None and not any(self.token in example for example in labels):
            found.append(
                f"no training answer contains the end-of-turn token {self.token}, so the model will not learn to stop: "
                "raise --sequence-length"
            )
        return found


def read_ending(root: Path, *, tuned: bool = False) -> Ending:
    """How the model in a directory ends its turns; an empty `Ending` if it has no tokenizer or no chat template.

    Args:
        root: the model's directory.
        tuned: the model will be fine-tuned; a missing chat template is then replaced by fp8pipe's plain one.

    Raises:
        ConfigurationError: the chat template is not valid.
    """
    try:
        tokenizer = import_transformers().AutoTokenizer.from_pretrained(
            str(root), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # loading may raise any type; not fatal: an engine may use another tokenizer
        return (
            Ending(warning=f"the tokenizer in {root} cannot be read: {_unknown(error)}")
            if (root / "tokenizer_config.json").is_file()
            else Ending()
        )
    template = template_info(tokenizer)
    return Ending() if template.origin == "plain" and not tuned else ending_of(root, tokenizer, template)


def ending_of(root: Path, tokenizer: Any, template: TemplateInfo) -> Ending:
    """Like `read_ending`, with a tokenizer and template that are already loaded.

    Args:
        root: the model's directory, with config.json and generation_config.json.
        tokenizer: a transformers tokenizer.
        template: the chat template in use.
    """
    try:
        token, mark = _end_of_turn(tokenizer, template)
        settings = _settings(root)
    except Exception as error:  # templates can raise any type
        return Ending(warning=_unknown(error))
    own = _ids(settings.get(EOS))
    if token is None:
        return Ending(warning=_endless(mark))
    if token in (*own, tokenizer.eos_token_id):
        return Ending(token)
    stops = [*own, token]
    warning = (
        f"the chat template ends turns with {mark} ({token}), which is neither the tokenizer's eos_token nor in "
        f"{EOS} of {GENERATION_FILE}, so engines would not stop at it: {EOS} of {GENERATION_FILE} is set to {stops}"
    )
    return Ending(token, settings | {EOS: stops}, warning)


def _end_of_turn(tokenizer: Any, template: TemplateInfo) -> tuple[int | None, str]:
    """Id and text of the first special token after an answer; without one, None and the text after the answer."""
    tail = _after_answer(tokenizer, template)
    special = {str(token): int(index) for index, token in tokenizer.added_tokens_decoder.items()}
    special |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    there = [(tail.index(token), -len(token), token) for token in special if token and token in tail]
    if not there:
        return None, tail.strip()
    token = min(there)[2]
    return special[token], token


def _after_answer(tokenizer: Any, template: TemplateInfo) -> str:
    """The text that the template adds after a finished answer."""
    failure: Exception = ValueError("it does not render the answer verbatim")
    for talk in (list(_TALK), in_parts(_TALK)):
        try:
            text = str(tokenizer.apply_chat_template(talk, chat_template=template.template, tokenize=False))
        except Exception as error:  # templates can raise any type
            failure = error
            continue
        _, found, tail = text.rpartition(_ANSWER)
        if found:
            return tail
    raise failure


def _settings(root: Path) -> dict[str, Any]:
    """Content of generation_config.json; if it is absent, the settings that engines take from config.json instead."""
    config = read_config(root / "config.json")
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else {}
    inherited = {key: value for key in ("bos_token_id", EOS, "pad_token_id")
                 if (value := config.get(key, text.get(key))) is not None}  # fmt: skip
    if not (root / GENERATION_FILE).is_file():
        return inherited
    settings = read_config(root / GENERATION_FILE)
    return settings if settings.get(EOS) is not None else settings | {EOS: inherited.get(EOS, [])}


def stop_tokens(root: Path) -> list[int]:
    """Ids of the tokens at which engines stop, in addition to the tokenizer's `eos_token`.

    Raises:
        BadArtifactError: a configuration cannot be read.
    """
    return _ids(_settings(root).get(EOS))


def _ids(value: Any) -> list[int]:
    return [value] if isinstance(value, int) else [int(index) for index in value or ()]


def _endless(mark: str) -> str:
    if mark:
        seen = f"{mark[:40]!r}, which is not a special token of the tokenizer"
        return f"the chat template ends answers with {seen}: engines stop only at tokens, so set `stop` in requests"
    return (
        "the chat template has no end-of-turn token after an answer, so the model cannot learn to stop and will "
        "generate up to the token limit; use a template with an end-of-turn token"
    )


def _unknown(error: Exception) -> str:
    why = class_and_one_line(error, 200)
    return f"cannot determine whether engines stop at the end of an answer: {why}"

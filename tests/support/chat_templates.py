"""Chat templates as published models have them, rebuilt, with what each of them makes of an answer; and tokenizers.

`answer` is the oracle: written by hand for each template, it says in plain Python which text the model has to produce.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from fp8pipe.models.compat import import_transformers


@dataclass(frozen=True)
class ChatTemplate:
    """One template."""

    jinja: str
    answer: Callable[[str], str]  # what the model produces for a content
    tokens: tuple[str, ...] = ()  # special tokens; the last is the end of a sequence
    calls: Callable[[list[tuple[str, dict]]], str] | None = None  # what it produces for tool calls without a content
    system: bool = True
    opens_with_answer: bool = False  # takes conversations that the assistant begins
    rewrites: bool = False  # renders an earlier answer otherwise than the last
    told: str = ""  # of a warning that its answers bring


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


_LOOP, _END = "{% for m in messages %}", "{% endfor %}"


def _turns(user: str, answer: str, prompt: str, system: str = "") -> str:
    system = system or user
    return (
        f"{_LOOP}{{% if m.role == 'assistant' %}}{answer}{{% elif m.role == 'system' %}}{system}"
        f"{{% else %}}{user}{{% endif %}}{_END}{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
    )


_LLAMA3 = (
    "{{ bos_token }}{% if tools %}<|start_header_id|>system<|end_header_id|>\n\n{{ tools | tojson }}<|eot_id|>"
    "{% endif %}"
    "{% for m in messages %}<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>\n\n"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}"
    "{{ '{\"name\": \"' + c.function.name + '\", \"parameters\": ' }}{{ c.function.arguments | tojson }}{{ '}' }}"
    "{% endfor %}{% elif m.role == 'tool' %}{{ m.content | tojson }}{% else %}{{ m.content | trim }}{% endif %}"
    "<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% elif m.role == 'system' %}{{ '[INST] ' + m.content + '\n\n' }}"
    "{% elif m.tool_calls is defined %}{{ '[TOOL_CALLS] [' }}{% for c in m.tool_calls %}"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}{{ ', ' if not loop.last }}"
    "{% endfor %}{{ ']' + eos_token }}"
    "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
_DEEPSEEK = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'tool' %}{{ '<｜tool▁output｜>' + m.content }}"
    "{% else %}{{ '<｜Assistant｜>' }}{% for c in m.tool_calls or [] %}"
    # Joined as text: arguments as an object make it fail.
    "{{ '<｜tool▁call｜>' + c.function.name + '\n```json\n' + c.function.arguments + '\n```' }}{% endfor %}"
    "{{ m.content + eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
_QWEN = (
    "{% if tools %}<|im_start|>system\n# Tools\n{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if not loop.previtem or loop.previtem.role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% else %}{{ '<|im_start|>' + m.role }}{% if m.content %}{{ '\n' + m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ '\n<tool_call>\n' }}"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}{{ '\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As reasoning models: earlier reasoning is dropped, and the prompt opens a block that an answer may lack.
_REASONING = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% if loop.last and m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
# As DeepSeek-R1: the prompt opens a block that no finished answer has, and reasoning is cut off of every answer.
_THINKS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% else %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
_UNLIKE = "the generation prompt ends in"
_DEEPSEEK_TOKENS = ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>")
_HARMONY = ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>")

TEMPLATES = {
    "chatml": ChatTemplate(
        _LOOP + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}" + _END
        + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        lambda content: content + "<|im_end|>", ("<|im_start|>", "<|im_end|>"), opens_with_answer=True,
    ),
    "llama-2": ChatTemplate(
        _turns("{{ bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}",
               "{{ ' ' + m.content | trim + ' ' + eos_token }}", "",
               "{{ bos_token + '<<SYS>>\n' + m.content | trim + '\n<</SYS>>\n\n' }}"),
        lambda content: f" {content.strip()} </s>", ("<s>", "</s>"),
    ),
    "llama-3": ChatTemplate(
        _LLAMA3, lambda content: content.strip() + "<|eot_id|>",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        lambda calls: "".join(f'{{"name": "{n}", "parameters": {_json(a)}}}' for n, a in calls) + "<|eot_id|>",
        opens_with_answer=True,
    ),
    "gemma": ChatTemplate(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + _LOOP
        + "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
        + "{% endif %}"
        + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim "
        + "+ '<end_of_turn>\n' }}" + _END + "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        lambda content: content.strip() + "<end_of_turn>", ("<bos>", "<start_of_turn>", "<end_of_turn>"), system=False,
    ),
    "mistral": ChatTemplate(
        _MISTRAL, lambda content: f" {content}</s>", ("<s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "</s>"),
        lambda calls: "[TOOL_CALLS] [" + ", ".join(_json({"name": n, "arguments": a}) for n, a in calls) + "]</s>",
    ),
    "phi-3": ChatTemplate(
        _LOOP + "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}" + _END
        + "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        lambda content: content + "<|end|>\n<|endoftext|>",
        ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"), rewrites=True,
    ),
    "deepseek": ChatTemplate(
        _DEEPSEEK, lambda content: content + "<｜end▁of▁sentence｜>",
        ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜tool▁call｜>", "<｜end▁of▁sentence｜>"),
        lambda calls: "".join(f"<｜tool▁call｜>{n}\n```json\n{_json(a)}\n```" for n, a in calls)
        + "<｜end▁of▁sentence｜>",
    ),
    "zephyr": ChatTemplate(
        _LOOP + "{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}" + _END
        + "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        lambda content: content + "</s>", ("<s>", "</s>"), opens_with_answer=True,
    ),
    "qwen": ChatTemplate(
        _QWEN, lambda content: content + "<|im_end|>", ("<|im_start|>", "<|im_end|>"),
        # The prompt ends in a line break, which an answer without content opens with, too.
        lambda calls: "\n".join(f"<tool_call>\n{_json({'name': n, 'arguments': a})}\n</tool_call>" for n, a in calls)
        + "<|im_end|>",
        opens_with_answer=True,
    ),
    "ends-in-a-space": ChatTemplate(
        _turns("{{ 'user: ' + m.content + '\n' }}", "{{ 'assistant: ' + m.content + eos_token + '\n' }}",
               "{{ 'assistant: ' }}"),
        lambda content: content + "</s>", ("<s>", "</s>"), opens_with_answer=True,
    ),
    "no-end-mark": ChatTemplate(
        _turns("{{ '### User:\n' + m.content + '\n\n' }}", "{{ '### Assistant:\n' + m.content + '\n\n' }}",
               "{{ '### Assistant:\n' }}"),
        lambda content: content, ("<s>", "</s>"), opens_with_answer=True,
    ),
    "strips": ChatTemplate(
        _turns("{{ 'Q: ' + m.content | trim + '\n\n' }}", "{{ 'A:\n\n' + m.content | trim + '\n<|end|>\n\n' }}",
               "{{ 'A:\n\n' }}"),
        lambda content: content.strip() + "\n<|end|>", ("<s>", "<|end|>"), opens_with_answer=True,
    ),
    "reasoning": ChatTemplate(
        _REASONING, lambda content: content + "<|im_end|>", ("<|im_start|>", "<|im_end|>"), opens_with_answer=True,
        told=_UNLIKE,
    ),
    "deepseek-r1": ChatTemplate(
        _THINKS, lambda content: content + "<｜end▁of▁sentence｜>", _DEEPSEEK_TOKENS, opens_with_answer=True,
        told=_UNLIKE,
    ),
    # As DeepSeek-V3.1: finished answers close the block that they never opened; both marks begin alike.
    "closes-the-block": ChatTemplate(
        _THINKS.replace("'<｜Assistant｜>' +", "'<｜Assistant｜></think>' +").replace("think>\n", "think>"),
        lambda content: content + "<｜end▁of▁sentence｜>", _DEEPSEEK_TOKENS, opens_with_answer=True, told=_UNLIKE,
    ),
    # A question that waits for its answer is marked, so that the prompt differs far before the answer.
    "marks-the-question": ChatTemplate(
        _LOOP + "{{ '<|im_start|>' + m.role + '\n' + ('[now] ' if loop.last and m.role != 'assistant' else '') "
        + "+ m.content + '<|im_end|>\n' }}" + _END
        + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        lambda content: content + "<|im_end|>", ("<|im_start|>", "<|im_end|>"), opens_with_answer=True, told=_UNLIKE,
    ),
    "no-prompt": ChatTemplate(
        _LOOP + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}" + _END,
        lambda content: f"<|im_start|>assistant\n{content}<|im_end|>", ("<|im_start|>", "<|im_end|>"),
        told="ignores add_generation_prompt",
    ),
    "gpt-oss": ChatTemplate(
        _LOOP + "{{ '<|start|>' + m.role }}{% if m.role == 'assistant' %}{{ '<|channel|>final' }}{% endif %}"
        + "{{ '<|message|>' + m.content + ('<|return|>' if loop.last and m.role == 'assistant' else '<|end|>') }}"
        + _END + "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
        lambda content: f"<|channel|>final<|message|>{content}<|return|>", _HARMONY, rewrites=True,
    ),
}  # fmt: skip

_TEXT = [
    "user: yes or no?\nassistant: no\nuser: is it?\nassistant: yes, it is!\n", '{"name": "find", "arguments"',
    "### Assistant:\nNo.\n\n### User:\nWhy?\n\nA:\n\nthe answer: yes!\n\n\nQ:  two  spaces, no",
    " no yes no. yes.\n no!\n yes?\n\n",
] * 20  # fmt: skip


@cache
def _trained(kind: str) -> str:
    """A BPE that has learned to join spaces and line breaks with what follows, as real ones do."""
    if kind == "bytes":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.post_processor = processors.ByteLevel(trim_offsets=True)  # hides the space that a token begins with
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    else:  # as Llama 2: no pre-tokenizer, so that tokens reach over words and lines
        backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Sequence([
            decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
        ])  # fmt: skip
        bytes_ = ["<unk>", *(f"<0x{value:02X}>" for value in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=bytes_, show_progress=False)
    backend.train_from_iterator(_TEXT, trainer)
    return backend.to_str()


@cache
def tokenizer_for(name: str, kind: str) -> Any:
    """A tokenizer with the template's special tokens: "bytes" (GPT-2's kind), "pieces" (Llama 2's) or "slow"."""
    template = TEMPLATES[name]
    given = {"bos_token": template.tokens[0], "eos_token": template.tokens[-1], "pad_token": template.tokens[-1],
             "additional_special_tokens": list(template.tokens), "chat_template": template.jinja}  # fmt: skip
    if kind == "slow":
        return slow_tokenizer()(**given)
    backend = Tokenizer.from_str(_trained(kind))
    return import_transformers().PreTrainedTokenizerFast(tokenizer_object=backend, **given)


_FIRST_WORD = 1000  # behind the special tokens


@cache
def slow_tokenizer() -> type:
    """A tokenizer written in Python, without offsets: words with the space before them, and single characters."""

    class SlowTokenizer(import_transformers().PreTrainedTokenizer):
        def __init__(self, **options: Any) -> None:
            self._words: dict[str, int] = {}
            super().__init__(**options)

        @property
        def vocab_size(self) -> int:
            return 1 << 20

        def get_vocab(self) -> dict[str, int]:
            return dict(self._words)

        def _tokenize(self, text: str, **_: Any) -> list[str]:
            return re.findall(r" ?\w+|\n+|[^\w\n]", text)

        def _convert_token_to_id(self, token: str) -> int:
            return self._words.setdefault(token, _FIRST_WORD + len(self._words))

        def _convert_id_to_token(self, index: int) -> str:
            return [*self._words][index - _FIRST_WORD]

        def convert_tokens_to_string(self, tokens: list[str]) -> str:
            return "".join(tokens)

    return SlowTokenizer

"""A chat template that is not valid is refused with its name, its line and the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.compat import import_transformers
from fp8pipe.models.language.text import Message, Record, encode, template_info

RECORD = Record((Message("user", "q"), Message("assistant", "a")))


@pytest.mark.parametrize(
    ("template", "line", "said"),
    [
        ("{% for m in messages %}\n{{ m.content }\n{% endfor %}", "line 2", "unexpected '}'"),
        ("{% for m in messages %}\n{{ m.content }}", "line 2", "end of template"),
        ("{{ messages | no_such_filter }}", "line 1", "no_such_filter"),
    ],
)
def test_what_is_no_valid_jinja(make_tokenizer: Any, tmp_path: Path, template: str, line: str, said: str) -> None:
    make_tokenizer(template).save_pretrained(tmp_path)
    tokenizer = import_transformers().AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ConfigurationError) as caught:
        template_info(tokenizer)
    assert str(tmp_path / "chat_template.jinja") in caught.value.what
    assert line in caught.value.why
    assert said in caught.value.why
    assert caught.value.exit_code == 10


@pytest.mark.parametrize("broken", ["messages[9].content", "messages.no_such()", "1 // 0", "'a' + 1"])
def test_what_fails_when_it_runs(make_tokenizer: Any, broken: str) -> None:
    tokenizer = make_tokenizer("{% for m in messages %}\n{{ m.content }}{% endfor %}\n\n{{ " + broken + " }}")
    template_info(tokenizer)
    with pytest.raises(ConfigurationError, match="cannot render record 1") as caught:
        encode([RECORD], tokenizer, 64)
    assert "line 4 of the template" in caught.value.why
    assert caught.value.exit_code == 10

"""The end of a turn: found in the template, and told to engines where they do not know it."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.compat import import_transformers
from fp8pipe.models.language.ending import Ending, ending_of, read_ending
from fp8pipe.models.language.text import Message, Record, encode, template_info

SPECIALS = ("<|end|>", "<|turn|>", "<|user|>", "<|assistant|>")  # 256 to 259
END, TURN = 256, 257
HEAD = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
TAIL = "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"


@pytest.fixture
def model(tmp_path):
    """`model(end of a turn, eos of the tokenizer, generation config, config)`: a directory without weights."""

    def make(end, eos="<|end|>", generation=None, config=None, template=None):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        backend.add_special_tokens(list(SPECIALS))
        tokenizer = import_transformers().PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)
        tokenizer.chat_template = HEAD + end + TAIL if template is None else template
        tokenizer.save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(config or {"model_type": "llama", "eos_token_id": END}))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return tmp_path

    return make


@pytest.mark.parametrize("generation", [None, {"eos_token_id": 5}, {"eos_token_id": [TURN, 5]}])
@pytest.mark.parametrize("end", ["<|end|>", "<|end|>\n", "\n<|end|>\n<|turn|>"])
def test_where_engines_stop_already_nothing_changes(model, end, generation):
    assert read_ending(model(end, generation=generation)) == Ending(token=END)
    assert read_ending(model(end, eos="<|turn|>", generation={"eos_token_id": [5, END]})) == Ending(token=END)


@pytest.mark.parametrize(
    ("generation", "stops"),
    [({"eos_token_id": END, "top_p": 0.9}, [END, TURN]), ({"eos_token_id": [END, 5]}, [END, 5, TURN]),
     ({"top_p": 0.9}, [END, TURN]), (None, [END, TURN])],
)  # fmt: skip
@pytest.mark.parametrize("end", ["<|turn|>", "<|turn|>\n", " <|turn|>\n<|end|>"])
def test_engines_are_told_where_a_turn_ends(model, end, generation, stops):
    ending = read_ending(model(end, generation=generation))
    assert ending.added == TURN
    assert ending.settings == (generation or {}) | {"eos_token_id": stops}
    assert json.loads(ending.text) == ending.settings
    (said,) = ending.warnings()
    assert "<|turn|>" in said
    assert str(stops) in said


def test_a_template_that_wants_texts_in_parts_is_asked_with_parts(model):
    """As those of models that take images, too; the first fails with a text, the second renders it as nothing."""
    for given in (
        "m['content'][0]['text']",
        "m['content'] | selectattr('type', 'eq', 'text') | map(attribute='text') | join",
    ):
        head = HEAD.replace("m['content']", given)
        assert read_ending(model("", template=head + "<|turn|>" + TAIL)).added == TURN


def test_what_config_json_says_stays_where_there_is_no_other_file(model):
    config = {"text_config": {"eos_token_id": [7, 8], "pad_token_id": 3}, "bos_token_id": 4}
    ending = read_ending(model("<|turn|>", config=config))
    assert ending.settings == {"bos_token_id": 4, "eos_token_id": [7, 8, TURN], "pad_token_id": 3}


@pytest.mark.parametrize(
    ("end", "said"),
    [("", "no end-of-turn token after"), ("\n\n", "no end-of-turn token after"), ("\n### END\n", "'### END'"),
     ("<|im_end|>", "not a special token")],
)  # fmt: skip
def test_a_template_without_an_end_is_warned_of(model, end, said):
    ending = read_ending(model(end))
    assert (ending.token, ending.settings) == (None, None)
    assert said in ending.warning


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{{ messages[0].content }}"])
def test_what_cannot_be_rendered_is_said(model, template):
    assert "cannot determine whether" in read_ending(model("", template=template)).warning


def test_a_tokenizer_that_cannot_be_read_is_named(model):
    root = model("<|end|>")
    (root / "tokenizer.json").write_text((root / "tokenizer.json").read_text()[:100])
    assert f"the tokenizer in {root} cannot be read" in read_ending(root).warning


def test_a_template_that_is_not_valid_is_refused(model):
    with pytest.raises(ConfigurationError, match="is not valid"):
        read_ending(model("", template="{% if %}"))


def test_a_model_without_tokenizer_or_template_has_nothing_to_say(model, tmp_path):
    (tmp_path / "none").mkdir()
    assert read_ending(tmp_path / "none") == Ending()
    bare = model("", template="")
    assert read_ending(bare) == Ending()
    assert read_ending(bare, tuned=True) == Ending(token=END)  # the plain template ends with the tokenizer's token


@pytest.mark.parametrize("length", [64, 12])
def test_the_end_is_learned_and_it_is_said_when_it_never_is(model, length):
    tokenizer = import_transformers().AutoTokenizer.from_pretrained(root := model("<|turn|>\n"))
    records = [Record((Message("user", "hi"), Message("assistant", "a long answer to that")))]
    encoding = encode(records, tokenizer, length)
    ending = ending_of(root, tokenizer, template_info(tokenizer))
    said = ending.warnings(example.labels for example in encoding.examples)
    assert (TURN in encoding.examples[0].labels) == (length == 64)
    assert any("will not learn to stop" in warning for warning in said) == (length == 12)

"""Tokenizes conversations and labels them so that the loss covers only the answers.

The tokens should be those that the model sees when it is served. So the text is rendered by the model's own chat
template (see ``render``) and tokenized as a whole. A served prompt, however, ends where the answer begins, and is
tokenized without the answer. If a token of the whole text extends across that boundary, or across the end of the
answer, the conversation is split into one example per answer, with prompt and answer tokenized separately.

Tokens that stand for images come from the model's processor, which is given the text before the first answer.

For a base model without a chat template, ``PLAIN_TEMPLATE`` is used. The caller must save it with the trained model.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.core.progress import track
from fp8pipe.models.language.text.conversation import Record
from fp8pipe.models.language.text.image_prompts import ImagePrompts, PromptImages, refuse_images
from fp8pipe.models.language.text.image_render import ImageRenderer, image_template
from fp8pipe.models.language.text.notes import Kind
from fp8pipe.models.language.text.render import Rendered, Renderer, shared
from fp8pipe.models.language.text.template import TemplateInfo, template_info

log = logging.getLogger(__name__)

IGNORED: Final = -100  # label of tokens that torch's cross entropy ignores
_BATCH: Final = 1000  # conversations tokenized at a time, to limit the memory used for offsets
_WINDOW: Final = 32  # tokens before a boundary that are tokenized again; no pre-tokenizer looks back further


@dataclass(frozen=True, slots=True)
class Encoded:
    """One training example: ``input_ids`` and ``labels`` of equal length.

    A label is the token id at the same position within an answer (the loss shifts the labels), and -100 elsewhere. The
    first label is always -100, because no earlier token can predict the first token. ``images`` are those of the
    prompt; None if it has none.
    """

    input_ids: list[int]
    labels: list[int]
    images: PromptImages | None = None

    @property
    def answer_tokens(self) -> int:
        """Number of labelled tokens, on which the loss is computed."""
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True, slots=True)
class Encoding:
    """The result of ``encode``.

    Attributes:
        examples: the training examples, in the order of the records.
        template: the chat template that was used.
        truncated: number of examples that were cut to the maximum length.
        dropped: number of examples left out because no labelled token remained; ``warnings`` gives the reasons.
        expanded: number of conversations that were split into one example per answer.
        warnings: warnings for the user and the manifest.
    """

    examples: list[Encoded]
    template: TemplateInfo
    truncated: int
    dropped: int
    expanded: int
    warnings: tuple[str, ...]


def encode(
    records: Sequence[Record],
    tokenizer: Any,
    max_length: int,
    *,
    images: ImagePrompts | None = None,
    last_only: bool = False,
    warn: Callable[[str], None] = log.warning,
) -> Encoding:
    """Tokenize conversations and label their answers.

    Args:
        records: the conversations.
        tokenizer: a transformers tokenizer, fast (with character offsets) or slow.
        max_length: maximum tokens per example, at least 2; longer examples are cut at the end.
        images: the model's processor, from ``load_image_prompts``; None refuses records with images.
        last_only: train only on the last answer of each conversation.
        warn: called with each of the result's warnings.

    Raises:
        ConfigurationError: the chat template is not valid, cannot render a record, or omits an answer; an image cannot
            be used; or no example has a labelled token within ``max_length`` tokens.
    """
    if max_length < 2:
        raise ConfigurationError(
            f"max_length is {max_length}",
            why="an example needs a prompt token and an answer token",
            fix="use for example 512",
        )
    renderer, template = _renderer(records, tokenizer, images, last_only)
    counts: Counter[str] = Counter()
    examples: list[Encoded] = []
    for start in range(0, len(records), _BATCH):
        rendered: list[Rendered] = []
        for index, record in enumerate(records[start : start + _BATCH], start=start):
            before = renderer.notes.counts[Kind.PARTIAL]
            pieces = renderer.render(record, f"the record at {record.place}" if record.place else f"record {index + 1}")
            if len(pieces) > 1:
                counts["followed" if pieces[-1].images != pieces[0].images else "expanded"] += 1
            if not pieces:
                counts["partial" if renderer.notes.counts[Kind.PARTIAL] > before else "unlearned"] += 1
            rendered += pieces
        for encoded in _tokenize(rendered, tokenizer) if images is None else _pictured(rendered, tokenizer, images):
            counts["merged"] += len(encoded) > 1
            for example in encoded:
                if (cut := _cut(example, max_length, counts)) is not None:
                    examples.append(cut)
    reasons = _reasons(counts, max_length)
    if not examples:
        raise _nothing_left(len(records), reasons, counts)
    total = len(examples) + sum(count for _, count in reasons)
    warnings = (*_warnings(total, counts, max_length, template), *renderer.notes.sentences())
    for warning in warnings:
        warn(warning)
    dropped, expanded = total - len(examples), sum(counts[key] for key in ("expanded", "followed", "merged"))
    return Encoding(examples, template, counts["truncated"], dropped, expanded, warnings)


def _renderer(
    records: Sequence[Record], tokenizer: Any, images: ImagePrompts | None, last_only: bool
) -> tuple[Renderer, TemplateInfo]:
    """The renderer of the records, and the chat template that it uses."""
    if images is not None:
        template = image_template(images, tokenizer)
        return ImageRenderer(images, tokenizer, template, last_only=last_only), template
    refuse_images(records)
    template = template_info(tokenizer)
    return Renderer(tokenizer, template, last_only=last_only), template


def _nothing_left(records: int, reasons: Sequence[tuple[str, int]], counts: Counter[str]) -> ConfigurationError:
    fix = (
        "use a chat template that renders answers as they are given"
        if counts["partial"]
        else "give records with answers"
    )
    return ConfigurationError(
        f"no answer token is left in any of the {records} records",
        why="; ".join(f"{count} examples: {why}" for why, count in reasons) or "there are no records",
        fix="raise max_length, or shorten the prompts" if counts["cut away"] else fix,
    )


def _cut(whole: Encoded, max_length: int, counts: Counter[str]) -> Encoded | None:
    """Truncate an example to ``max_length`` tokens; if no labelled token remains, count the reason and return None."""
    first = [IGNORED] if whole.labels else []
    cut = Encoded(whole.input_ids[:max_length], first + whole.labels[1:max_length], whole.images)
    counts["truncated"] += len(whole.input_ids) > max_length
    if cut.answer_tokens:
        counts["bare"] += whole.labels[0] != IGNORED
        return cut
    prompt = next((i for i, label in enumerate(whole.labels[1:], 1) if label != IGNORED), 0)
    counts["cut away" if prompt else "headless"] += 1
    counts["longest"] = max(counts["longest"], prompt)
    return None


def _reasons(counts: Counter[str], max_length: int) -> list[tuple[str, int]]:
    """Why examples were left out, and how many for each reason."""
    found = {
        "cut away": f"no answer token within {max_length} tokens; prompts reach {counts['longest']} tokens",
        "headless": "nothing comes before their only token, so that nothing can predict it",
        "unlearned": "every answer of them has weight 0, or is not the last one",
        "partial": "the chat template renders only a part of their answers",
    }
    return [(why, counts[key]) for key, why in found.items() if counts[key]]


def _warnings(total: int, counts: Counter[str], max_length: int, template: TemplateInfo) -> list[str]:
    found = []
    if counts["truncated"]:
        found.append(f"{counts['truncated']} of {total} examples were cut to {max_length} tokens")
    found += [f"{count} of {total} examples were left out: {why}" for why, count in _reasons(counts, max_length)]
    if bare := counts["bare"]:
        why = "begin with their answer, whose first token is not learned: nothing comes before it"
        found.append(f"{bare} of {total} examples {why}")
    apart = "conversations were cut into one example for each answer: "
    if counts["expanded"]:
        why = "the chat template renders earlier answers differently once others follow"
        found.append(f"{counts['expanded']} {apart}{why}")
    if counts["followed"]:
        found.append(f"{counts['followed']} {apart}images follow their first answer, and only a prompt can have images")
    if counts["merged"]:
        why = "tokens reach over the border between a prompt and its answer, or over the answer's end"
        found.append(f"{counts['merged']} {apart}{why}")
    if template.origin == "plain":
        found.append(
            "the tokenizer has no chat template; the plain question-answer template is used, and saved with the model"
        )
    return found


def _tokenize(rendered: Sequence[Rendered], tokenizer: Any) -> list[list[Encoded]]:
    """Tokenize rendered texts, without adding special tokens beyond those of the template.

    Returns:
        For each text, its examples: usually one, or one per answer. The first token may still have a label.
    """
    texts = [r.text for r in rendered]
    if getattr(tokenizer, "is_fast", False) and texts:
        batch = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        whole = batch["input_ids"]
        starts = [[offset[0] for offset in offsets] for offsets in batch["offset_mapping"]]
        places = _places_by_offset(rendered, whole, starts, tokenizer)
    else:
        whole = [_ids(text, tokenizer) for text in texts]
        places = [_places_by_prefix(r, ids, tokenizer) for r, ids in zip(rendered, whole, strict=True)]
    examples = []
    for piece, ids, borders in zip(rendered, whole, places, strict=True):
        if None in borders:
            examples.append([_apart(piece.text, start, end, tokenizer) for start, end in piece.spans])
            continue
        labels = [IGNORED] * len(ids)
        for start, end in zip(borders[::2], borders[1::2], strict=True):
            labels[start:end] = ids[start:end]
        examples.append([Encoded(list(ids), labels)])
    return examples


def _pictured(rendered: Sequence[Rendered], tokenizer: Any, images: ImagePrompts) -> Iterator[Sequence[Encoded]]:
    """Like `_tokenize`, for texts of which some have images; shows progress, because each image is read."""
    with track(sum(bool(piece.images) for piece in rendered), "reading images") as progress:
        for piece, encoded in zip(rendered, _tokenize(rendered, tokenizer), strict=True):
            yield _with_images(piece, encoded, tokenizer, images) if piece.images else encoded
            progress.advance(bool(piece.images))


def _with_images(
    piece: Rendered, encoded: Sequence[Encoded], tokenizer: Any, images: ImagePrompts
) -> Sequence[Encoded]:
    """Examples of a text with the processor's tokens in place of the tokenizer's before the first answer.

    Args:
        piece: the text; all its images precede the first answer.
        encoded: its examples, from `_tokenize`, in which one token stands for an image.
        tokenizer: the model's tokenizer.
        images: the model's processor.
    """
    starts = [start for start, _ in piece.spans][: len(encoded)]
    found = []
    for start, example in zip(starts, encoded, strict=True):
        plain = len(_ids(piece.text[:start], tokenizer))
        read = images.read(piece.text[:start], piece.images)
        labels = [IGNORED] * len(read.tokens) + example.labels[plain:]
        found.append(Encoded([*read.tokens, *example.input_ids[plain:]], labels, read))
    return found


def _places_by_offset(
    rendered: Sequence[Rendered], whole: Sequence[Sequence[int]], starts: Sequence[Sequence[int]], tokenizer: Any
) -> list[list[int | None]]:
    """Token indices of the starts and ends of answers, from character offsets.

    An index is None if the text before that boundary, tokenized without what follows, gives other tokens. Offsets alone
    do not show this, because some tokenizers exclude a token's leading white space from them. So the last tokens before
    each boundary are tokenized again.

    Args:
        rendered: the texts with the character ranges of their answers.
        whole: token ids of each text.
        starts: for each text, the character offset at which each token starts.
        tokenizer: a fast tokenizer.
    """
    places: list[list[int | None]] = []
    # For each boundary: index of the text, index of the boundary, the text before it and the tokens of that text.
    windows: list[tuple[int, int, str, Sequence[int]]] = []
    for number, (piece, ids, begins) in enumerate(zip(rendered, whole, starts, strict=True)):
        borders = [border for span in piece.spans for border in span]
        position, found = 0, []
        for at, border in enumerate(borders):
            while position < len(ids) and begins[position] < border:
                position += 1
            found.append(position)
            first = max(0, position - _WINDOW)
            opening = begins[first] if first else 0
            if border < len(piece.text):
                windows.append((number, at, piece.text[opening:border], ids[first:position]))
        places.append([*found])
    alone = tokenizer([window[2] for window in windows], add_special_tokens=False)["input_ids"] if windows else []
    for (number, at, _, expected), ids in zip(windows, alone, strict=True):
        # A full window begins in the middle of the text, where tokens may differ: only its second half is compared.
        compared = len(expected) // 2 if len(expected) == _WINDOW else max(len(expected), len(ids))
        if list(ids[-compared:] if compared else ids) != list(expected[-compared:] if compared else expected):
            places[number][at] = None
    return places


def _places_by_prefix(piece: Rendered, ids: Sequence[int], tokenizer: Any) -> list[int | None]:
    """Like `_places_by_offset`, for tokenizers without offsets: the text before each boundary is tokenized again."""
    places: list[int | None] = []
    for border in (border for span in piece.spans for border in span):
        prefix = _ids(piece.text[:border], tokenizer)
        places.append(len(prefix) if shared(prefix, ids) == len(prefix) else None)
    return places


def _apart(text: str, start: int, end: int, tokenizer: Any) -> Encoded:
    """The example of one answer, with prompt and answer tokenized separately, as when the model is served."""
    prompt, answer = _ids(text[:start], tokenizer), _continued(text[start:end], tokenizer)
    return Encoded(prompt + answer, [IGNORED] * len(prompt) + answer)


def _continued(text: str, tokenizer: Any) -> list[int]:
    """Tokens of a text as the continuation of another text, without the space that some tokenizers put at the start."""
    for before in ("\n", "a", "."):
        head, both = _ids(before, tokenizer), _ids(before + text, tokenizer)
        if both[: len(head)] == head and _decoded(both, tokenizer) == _decoded(head, tokenizer) + text:
            return both[len(head) :]
    return _ids(text, tokenizer)


def _ids(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _decoded(ids: Sequence[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

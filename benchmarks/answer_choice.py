"""A multiple-choice task made from held-out records: which of four answers belongs to this question?"""

from __future__ import annotations

import json
import random
from pathlib import Path

import yaml

from fp8pipe.models.language.base import load_tokenizer
from fp8pipe.models.language.sources import resolve_model
from fp8pipe.models.language.text import IGNORED
from pipeline.finetune.config import FinetuneConfig
from pipeline.finetune.text import load_text

NAME = "answer_choice"
_CHOICES = 4


def write_task(folder: Path, config: FinetuneConfig) -> Path:
    """Write the task for `fp8pipe evaluate`; wrong answers are those of other held-out records, drawn with a seed.

    Args:
        folder: the directory to write it to.
        config: determines the data and its split. Prompts have the model's chat template.

    Returns:
        `folder`.
    """
    source = resolve_model(config.model)
    tokenizer = load_tokenizer(source.path)
    text = load_text(config.model_copy(update={"batch_size": 1, "packing": False}), source)
    pairs = []
    for batch in (text.heldout.at(index) for index in range(len(text.heldout))):
        ids, labels = batch.input_ids[0].tolist(), batch.labels[0].tolist()
        first = next(index for index, label in enumerate(labels) if label != IGNORED)
        answer = [label for label in labels if label != IGNORED]
        pairs.append((tokenizer.decode(ids[:first]), tokenizer.decode(answer, skip_special_tokens=True).strip()))
    draw, lines = random.Random(0), []
    for prompt, answer in pairs:
        others = sorted({other for _, other in pairs} - {answer})
        choices = [answer, *draw.sample(others, _CHOICES - 1)]
        draw.shuffle(choices)
        lines.append({"question": prompt, "choices": choices, "answer": choices.index(answer)})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{NAME}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = {
        "task": NAME, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{NAME}.jsonl"}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "target_delimiter": "", "doc_to_choice": "choices", "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (folder / f"{NAME}.yaml").write_text(yaml.safe_dump(task))
    return folder

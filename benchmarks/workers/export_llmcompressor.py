"""Write an FP8 checkpoint with llm-compressor: one scale per channel, activations scaled per token when it is run.

    python export_llmcompressor.py [--model-free] MODEL OUTPUT

MODEL is a directory in Hugging Face's layout. `--model-free` uses the path that reads files instead of a model. Runs in
llm-compressor's environment.
"""

from __future__ import annotations

import sys


def main() -> None:
    *options, model_path, output = sys.argv[1:]
    if options:
        from llmcompressor import model_free_ptq

        model_free_ptq(model_path, output, scheme="FP8_DYNAMIC", ignore=["lm_head", "re:.*embed_tokens"], device="cpu")
        return
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto")
    recipe = QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=["lm_head"])
    oneshot(model=model, recipe=recipe)
    model.save_pretrained(output, save_compressed=True)
    AutoTokenizer.from_pretrained(model_path).save_pretrained(output)


if __name__ == "__main__":
    main()

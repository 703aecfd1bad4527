"""Write an FP8 checkpoint with ModelOpt: one scale per channel, activations scaled per token when it is run.

    python export_modelopt.py MODEL OUTPUT

MODEL is a directory in Hugging Face's layout. Runs in ModelOpt's environment.
"""

from __future__ import annotations

import sys


def main() -> None:
    model_path, output = sys.argv[1:]
    import torch

    # The torchvision of PyPI cannot load its operators with a CPU build of torch; declared, it can be imported.
    declared = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto").eval()
    with torch.inference_mode():
        model = mtq.quantize(model, mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG)
        export_hf_checkpoint(model, export_dir=output)
    AutoTokenizer.from_pretrained(model_path).save_pretrained(output)


if __name__ == "__main__":
    main()

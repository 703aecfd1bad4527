#!/usr/bin/env bash
# The main road on a real model, end to end: convert SmolLM2-135M-Instruct from its package, fine-tune it in FP8 on real
# question-answer pairs, export, prove in a real vLLM that it serves exactly what was trained, and ask it a question. Then
# the same for vision: quantize a ViT to 4 bits with no data, export it to ONNX, and classify real digits with it.
# Both environments must exist (`make demo` sees to it). Everything is written below OUTPUT.
set -euo pipefail
cd "$(dirname "$0")/.."
output="${OUTPUT:-runs/demo}"
question="${QUESTION:-What is the capital of France?}"
started=$SECONDS
fp8pipe() { .venv/bin/python -P -m fp8pipe "$@"; }
say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

mkdir -p "$output"
say "1/7  Fine-tune in FP8 (FALQON, rank 64, 40 steps of 1,024 tokens)"
fp8pipe finetune --model sample:smollm2 --data sample:chatterbot --output "$output/model" --force \
    --rank 64 --steps 40 --batch-size 8 --sequence-length 128 --evaluate-every 0
say "2/7  Export to vLLM"
fp8pipe export "$output/model" --target vllm --output "$output/vllm" --force
say "3/7  Validate in a real vLLM engine"
export OMP_WAIT_POLICY=passive  # vLLM has several processes
fp8pipe validate "$output/vllm" --engine vllm --against "$output/model"
say "4/7  Ask it through /v1/chat/completions"
answer="$(.venv/bin/python -P -m serving.vllm.ask "$output/vllm" "$question")"
printf '  question: %s\n  answer:   %s\n' "$question" "$answer"

unset OMP_WAIT_POLICY
say "5/7  Quantize a vision transformer to 4 bits, with no data"
fp8pipe quantize-vit --model sample:vit-digits --bits w4a4 --output "$output/digits" --force
say "6/7  Export it to ONNX, and prove it in ONNX Runtime"
fp8pipe export "$output/digits" --target onnx --output "$output/onnx" --force
fp8pipe validate "$output/onnx" --against "$output/digits"
say "7/7  Classify real digits with the exported graph, in ONNX Runtime alone"
rm -rf "$output/pictures"
.venv/bin/python -P scripts/write_digits.py "$output/pictures"
.venv/bin/python -P scripts/classify_onnx.py "$output/onnx" "$output/pictures" | tail -1

verdict="$(.venv/bin/python -c '
import json, sys
verdicts = {json.load(open(path))["verdict"] for path in sys.argv[1:]}
print(verdicts.pop() if len(verdicts) == 1 else "REGRESSION")' "$output/vllm.validation.json" "$output/onnx.validation.json")"
say "Where everything lies"
cat <<TXT
  $output/model                  the trained artifact: FP8 codes, scales, metrics.jsonl, plot.png, manifest.json
  $output/vllm                   the checkpoint that vLLM loads
  $output/digits                 the 4-bit vision transformer, and the images it was calibrated on
  $output/onnx                   its ONNX graph, with preprocessing
  $output/*.validation.json      what was proved about them
  took $((SECONDS - started)) s
TXT
echo "$verdict"

#!/usr/bin/env bash
# The main road on a real model, end to end: convert SmolLM2-135M-Instruct from its package, fine-tune it in FP8 on real
# question-answer pairs, export, prove in a real vLLM that it serves exactly what was trained, and ask it a question.
# Both environments must exist (`make demo` sees to it). Everything is written below OUTPUT.
set -euo pipefail
cd "$(dirname "$0")/.."
output="${OUTPUT:-runs/demo}"
question="${QUESTION:-What is the capital of France?}"
export OMP_WAIT_POLICY=passive
started=$SECONDS
fp8pipe() { .venv/bin/python -P -m fp8pipe "$@"; }
say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

mkdir -p "$output"
say "1/4  Fine-tune in FP8 (FALQON, rank 64, 40 steps of 1,024 tokens)"
fp8pipe finetune --model sample:smollm2 --data sample:chatterbot --output "$output/model" --force \
    --rank 64 --steps 40 --batch-size 8 --sequence-length 128 --evaluate-every 0
say "2/4  Export to vLLM"
fp8pipe export "$output/model" --target vllm --output "$output/vllm" --force
say "3/4  Validate in a real vLLM engine"
fp8pipe validate "$output/vllm" --engine vllm --against "$output/model"
say "4/4  Ask it through /v1/chat/completions"
answer="$(.venv/bin/python -P -m serving.vllm.ask "$output/vllm" "$question")"
printf '  question: %s\n  answer:   %s\n' "$question" "$answer"

verdict="$(.venv/bin/python -c 'import json, sys; print(json.load(open(sys.argv[1]))["verdict"])' "$output/vllm.validation.json")"
say "Where everything lies"
cat <<TXT
  $output/model                  the trained artifact: FP8 codes, scales, metrics.jsonl, plot.png, manifest.json
  $output/vllm                   the checkpoint that vLLM loads
  $output/vllm.validation.json   what was proved about it
  took $((SECONDS - started)) s
TXT
echo "$verdict"

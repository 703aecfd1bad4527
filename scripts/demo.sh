#!/usr/bin/env bash
# The main workflow on real models, end to end. The recipe `end-to-end` tunes SmolLM2-135M-Instruct in FP8, exports it, and
# proves with vLLM itself that it serves exactly what was trained. It also quantizes a ViT to 4 bits without data, validates
# it in ONNX Runtime, and builds a TensorRT engine. Then the tuned model is asked a question, and the exported graph
# classifies real digits. Both Python environments must exist; `make demo` creates them. All output is written to the
# directory OUTPUT (default runs/demo); a second run reuses it.
set -euo pipefail
cd "$(dirname "$0")/.."
output="${OUTPUT:-runs/demo}"
question="${QUESTION:-What is the capital of France?}"
started=$SECONDS
fp8pipe() { .venv/bin/python -P -m fp8pipe "$@"; }
say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

say "1/3  Run the recipe: tune, quantize, export, prove, measure, serve"
fp8pipe run recipes/end-to-end.yaml --output "$output"
say "2/3  Ask the tuned model through /v1/chat/completions"
answer="$(OMP_WAIT_POLICY=passive .venv/bin/python -P -m validation.vllm.ask "$output/smollm2-vllm" "$question")"
printf '  question: %s\n  answer:   %s\n' "$question" "$answer"
say "3/3  Classify real digits with the exported graph, in ONNX Runtime alone"
rm -rf "$output/pictures"
.venv/bin/python -P scripts/write_digits.py "$output/pictures"
.venv/bin/python -P scripts/classify_onnx.py "$output/digits-onnx" "$output/pictures" | tail -1

say "Files"
cat <<TXT
  $output/report.html            every verdict, curve and figure, each with the file it comes from
  $output/run.json               the same as data: stages, digests, times, gates
  $output/smollm2                the trained artifact: FP8 codes, scales, metrics.jsonl, plot.png, manifest.json
  $output/smollm2-vllm           the checkpoint that vLLM loads
  $output/digits                 the 4-bit vision transformer, and the images it was calibrated on
  $output/digits-onnx            its ONNX graph, with preprocessing; digits-trt: the same for TensorRT, with an engine
  $output/*.validation.json      what was proved about the exports
  took $((SECONDS - started)) s
TXT
.venv/bin/python -P -c 'import sys; from pathlib import Path; from fp8pipe.artifact.runs import read_run
print(read_run(Path(sys.argv[1])).verdict)' "$output"

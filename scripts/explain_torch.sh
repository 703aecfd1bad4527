#!/usr/bin/env bash
# Print to stderr which package index is needed when pip finds no suitable torch. Called by the set-up of both
# environments before it fails.
#
#   scripts/explain_torch.sh REQUIREMENT        (for example torch==2.13.0)
case "$1" in
    *2.13.0*) need="the CPU build of torch 2.13.0
  (its wheels are named 2.13.0+cpu)" ;;
    *) need="$1" ;;
esac
cat >&2 <<TXT
set-up: pip could not install $1. It needs a package index that offers $need for this Python; PyTorch's install page names one. Make it known to pip with
      python -m pip config set global.extra-index-url URL
  or, for one call, with the variable PIP_EXTRA_INDEX_URL=URL; then run the set-up again.
TXT

"""Runs several probe jobs in one vLLM process, one engine after another: starting Python and vLLM is most of the
time of a tiny engine. Started with vLLM's Python: `engine_host.py PROBE.py JOBS.json`.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path


def main() -> None:
    spec = importlib.util.spec_from_file_location("probe", sys.argv[1])
    assert spec is not None
    assert spec.loader is not None
    probe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(probe)
    results = []
    jobs = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    for job in jobs:
        os.environ.update(job.get("environment", {}))
        try:
            results.append(probe.plain(probe.run(job)))
        except Exception as error:
            traceback.print_exc()
            results.append({"error": repr(error)})
        gc.collect()
        from vllm.distributed import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()
    Path(jobs[0]["result"]).write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()

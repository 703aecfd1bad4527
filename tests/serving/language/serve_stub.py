"""The real front and supervisor over the stub: `serve_stub.py EXPORT STATE KEYFILE|- [JSON of LanguageConfig]`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from fp8pipe.artifact import open_artifact
from fp8pipe.core.errors import Fp8PipeError
from fp8pipe.core.progress import setup_logging
from serving.config import LanguageConfig, ServeConfig, SupervisorConfig
from serving.http.service import Proof
from serving.language.server import run_front, supervise


def main() -> int:
    setup_logging(json=False, quiet=False, verbose=False)
    state = Path(sys.argv[2])
    socket = state / "stub.sock"
    stub = Path(__file__).with_name("stub_engine.py")
    times = SupervisorConfig(
        probe_every_s=0.1,
        first_delay_s=0.5,
        stop_grace_s=2,
        probe_timeout_s=2,
        engine_timeout_s=3,
        engine_probe_every_s=0.2,
    )
    given = json.loads(sys.argv[4]) if len(sys.argv) > 4 else {}
    language = LanguageConfig(supervision=times, served_model_name="stub", **given)
    supervisor = supervise(
        [sys.executable, str(stub), str(socket), str(state)],
        dict(os.environ), socket, state / "log", "stub", language,
    )  # fmt: skip
    key_file = Path(sys.argv[3]) if len(sys.argv) > 3 and sys.argv[3] != "-" else None
    config = ServeConfig(port=0, linger_s=0.5, max_body_mb=1, api_key_file=key_file)
    try:
        return run_front(
            supervisor, open_artifact(sys.argv[1], verify=False), config, language, Proof("unvalidated", "", {})
        )
    except Fp8PipeError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())

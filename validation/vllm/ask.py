"""Ask an export one question through vLLM's OpenAI server: `python -m validation.vllm.ask EXPORT "question"`.

Starts the server, sends one `/v1/chat/completions` request, prints the answer to stdout, and stops the server.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from fp8pipe.core.errors import Fp8PipeError
from fp8pipe.core.progress import setup_logging
from validation.vllm.launcher import ServerOptions, open_local, server


def ask(url: str, model: str, question: str, *, max_tokens: int = 64, api_key: str | None = None) -> str:
    """Get one greedy answer from a running server.

    Args:
        url: base URL of the server.
        model: the model name in the API.
        question: the user's message.
        max_tokens: longest answer, tokens.
        api_key: the API key, if the server requires one.

    Raises:
        Fp8PipeError: the server rejected the request or did not answer; its error message is quoted.
    """
    messages = [{"role": "user", "content": question}]
    body = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0}
    headers = {"Content-Type": "application/json"} | ({} if api_key is None else {"Authorization": f"Bearer {api_key}"})
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    try:
        with open_local(request, timeout_s=600) as reply:
            document = json.load(reply)
    except urllib.error.HTTPError as error:
        words = error.read().decode("utf-8", errors="replace")
        raise Fp8PipeError("vLLM's server rejected the question", why=f"{error.code}: {words}") from error
    except (urllib.error.URLError, OSError) as error:
        raise Fp8PipeError("vLLM's server did not answer", why=str(error)) from error
    return str(document["choices"][0]["message"]["content"])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command-line entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m validation.vllm.ask", description="Ask an export one question.")
    parser.add_argument("export", type=Path, help="directory of an export to vLLM")
    parser.add_argument("question")
    parser.add_argument("--max-tokens", type=int, default=64, help="largest number of tokens in the answer (64)")
    parser.add_argument("--vllm-python", help="vLLM's Python interpreter")
    given = parser.parse_args(arguments)
    setup_logging(json=False, quiet=False, verbose=False)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the server is stopped too
    try:
        options = ServerOptions(served_name="export")
        with server(given.export, options, vllm_python=given.vllm_python) as url:
            print(ask(url, "export", given.question, max_tokens=given.max_tokens))
    except Fp8PipeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The health check of the container images: exits with 0 if `/healthz` answers 200. The images do not contain curl."""

from __future__ import annotations

import http.client
import os
import sys


def main() -> int:
    """Probe the service in this container; returns the exit code, 0 if it answers 200 and 1 otherwise.

    The environment variable `FP8PIPE_PORT` overrides the default port 8000.
    """
    connection = http.client.HTTPConnection("127.0.0.1", int(os.environ.get("FP8PIPE_PORT", "8000")), timeout=3)
    try:
        connection.request("GET", "/healthz")
        return int(connection.getresponse().status != 200)
    except (OSError, http.client.HTTPException):
        return 1
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main())

"""Asks the server of this host and ``PORT`` whether it is ready: ``python -m server.http.health_check``.

For a container's health check: exit 0 or 1, and one line that says why. It runs every few seconds, so it
imports neither the settings nor anything else that would import torch.
"""

import http.client
import json
import os
import sys

_EVERY_ADDRESS = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
_TIMEOUT = 4.0  # seconds; less than the container's own limit, so that the line is written


def check(host: str, port: int) -> tuple[bool, str]:
    """Whether ``/health`` says ready, and what it says otherwise.

    ``http.client`` rather than ``urllib``: a proxy in the environment is not for this.
    """
    connection = http.client.HTTPConnection(host, port, timeout=_TIMEOUT)
    try:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        return answer.status == 200, _said(answer.read())
    except (OSError, http.client.HTTPException) as error:
        return False, f"no answer on {host}, port {port}: {error}"
    finally:
        connection.close()


def _said(body: bytes) -> str:
    try:
        told = json.loads(body)
        return str(told.get("error") or told["status"])
    except (ValueError, AttributeError, KeyError):
        return "not the answer of a bitdial server"


def main() -> int:
    host, port = os.environ.get("HOST", ""), os.environ.get("PORT", "") or "8080"
    ready, said = check(_EVERY_ADDRESS.get(host, host), int(port))
    print(said)
    return 0 if ready else 1


if __name__ == "__main__":
    sys.exit(main())

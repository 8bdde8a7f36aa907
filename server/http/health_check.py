"""A container's health check, ``python -m server.http.health_check``: GET ``/health`` on ``HOST``, ``PORT``.

Exits with 0 or 1 and prints one line with the reason. It runs every few seconds, so it imports neither the
settings nor any other module that imports torch.
"""

import http.client
import json
import os
import sys

_EVERY_ADDRESS = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
_TIMEOUT = 4.0  # seconds; below the container's own limit, so that the line is printed


def check(host: str, port: int) -> tuple[bool, str]:
    """Whether ``/health`` answers 200, and the status or error that it reports.

    Uses ``http.client``, which ignores the environment's proxies, unlike ``urllib``.
    """
    connection = http.client.HTTPConnection(host, port, timeout=_TIMEOUT)
    try:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        return answer.status == 200, _reported(answer.read())
    except (OSError, http.client.HTTPException) as error:
        return False, f"no answer on {host}, port {port}: {error}"
    finally:
        connection.close()


def _reported(body: bytes) -> str:
    try:
        fields = json.loads(body)
        return str(fields.get("error") or fields["status"])
    except (ValueError, AttributeError, KeyError):
        return "not the answer of a bitdial server"


def main() -> int:
    host, port = os.environ.get("HOST", ""), os.environ.get("PORT", "") or "8080"
    ready, reported = check(_EVERY_ADDRESS.get(host, host), int(port))
    print(reported)
    return 0 if ready else 1


if __name__ == "__main__":
    sys.exit(main())

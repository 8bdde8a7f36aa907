"""``/tokenize``."""

from starlette.testclient import TestClient

from tests.test_generate import PROMPT


def test_tokenize(client: TestClient) -> None:
    told = client.post("/tokenize", json={"inputs": PROMPT}).json()
    assert "".join(token["text"] for token in told) == PROMPT
    assert [token["start"] for token in told[1:]] == [token["stop"] for token in told[:-1]]
    assert client.post("/tokenize", json={"inputs": ""}).status_code == 422

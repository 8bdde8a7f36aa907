"""``GET /`` for browsers and the files of its page: who gets them, with which headers, and where they are."""

import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urljoin

import pytest
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

import server.playground

MakeClient = Callable[..., TestClient]
STATIC = Path(server.playground.__file__).with_name("static")
FILES = sorted(str(path.relative_to(STATIC)) for path in STATIC.rglob("*") if path.is_file())
BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
KINDS = {".html": "text/html", ".css": "text/css", ".js": "javascript"}


def test_a_browser_gets_the_page(client: TestClient) -> None:
    reply = client.get("/", headers=BROWSER)
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/html")
    assert reply.headers["vary"] == "Accept"
    assert reply.text.startswith("<!doctype html>")
    head = client.head("/", headers=BROWSER)
    assert (head.status_code, head.content) == (200, b"")


@pytest.mark.parametrize("accept", ["*/*", "application/json", "text/plain", ""])
def test_other_clients_are_told_that_the_base_url_takes_post(client: TestClient, accept: str) -> None:
    reply = client.get("/", headers={"Accept": accept})
    assert reply.status_code == 405
    assert "POST" in reply.headers["allow"]
    assert reply.json()["error_type"] == "validation"


def test_posts_to_the_base_url_generate_whatever_they_accept(client: TestClient) -> None:
    body = {"inputs": "abc", "parameters": {"max_new_tokens": 2}}
    [answer] = client.post("/", json=body, headers=BROWSER).json()
    assert answer["generated_text"]


@pytest.mark.parametrize("name", FILES)
def test_every_file_has_its_type_and_the_strict_headers(client: TestClient, name: str) -> None:
    reply = client.get(f"/playground/{name}")
    assert reply.content == (STATIC / name).read_bytes()
    assert KINDS[Path(name).suffix] in reply.headers["content-type"]
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["cache-control"] == "no-cache"
    policy = dict(part.strip().split(" ", 1) for part in reply.headers["content-security-policy"].split(";"))
    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "connect-src": "'self'",
        "img-src": "'self' data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }


def test_the_page_has_the_headers_of_its_files(client: TestClient) -> None:
    page, file = client.get("/", headers=BROWSER), client.get("/playground/index.html")
    for name in ("content-security-policy", "x-content-type-options", "referrer-policy", "etag"):
        assert page.headers[name] == file.headers[name]


def test_a_file_that_the_browser_has_is_not_sent_again(client: TestClient) -> None:
    first = client.get("/playground/api.js")
    again = client.get("/playground/api.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize(
    "name", ["", "nothing.js", "panels", "../__init__.py", "..%2f__init__.py", "%2fetc%2fpasswd"]
)
def test_nothing_but_its_files_is_served(client: TestClient, name: str) -> None:
    reply = client.get(f"/playground/{name}")
    assert reply.status_code == 404
    assert reply.json()["error_type"] == "not_found"


def test_the_page_needs_no_key_and_what_it_requests_does(make_client: MakeClient) -> None:
    client = make_client(api_key="right")
    assert client.get("/", headers=BROWSER).status_code == 200
    assert client.get("/playground/api.js").status_code == 200
    assert client.get("/stats").status_code == 401
    assert client.post("/", json={"inputs": "abc"}).status_code == 401


def test_the_page_refers_to_its_own_server_alone_and_by_relative_addresses() -> None:
    page = (STATIC / "index.html").read_text()
    addresses = re.findall(r'(?:href|src|action)="([^"]*)"', page)
    assert "playground/app.js" in addresses
    assert not [address for address in addresses if address.startswith(("/", "http"))]
    assert not re.search(r"<script(?![^>]*src=)|\son\w+=|\sstyle=", page)  # nothing that the policy blocks


def test_modules_import_files_that_exist_by_relative_paths() -> None:
    for module in STATIC.rglob("*.js"):
        for target in re.findall(r'(?:from|import)\s*\(?"([^"]+)"', module.read_text()):
            assert target.startswith("."), (module.name, target)
            assert (module.parent / target).resolve().is_file(), (module.name, target)


def test_no_module_makes_markup_of_text() -> None:
    for module in STATIC.rglob("*.js"):
        found = re.findall(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", module.read_text()
        )
        assert not found, module.name


def test_modules_have_at_most_250_lines() -> None:
    assert not [path.name for path in STATIC.rglob("*.js") if len(path.read_text().splitlines()) > 250]


def test_the_page_works_behind_a_path_prefix(client: TestClient) -> None:
    async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["path"].startswith("/prefix/")
        await client.app({**scope, "path": scope["path"].removeprefix("/prefix")}, receive, send)

    behind = TestClient(proxy)
    page = behind.get("/prefix/", headers=BROWSER)
    assert page.status_code == 200
    addresses = re.findall(r'(?:href|src)="([^"#]+)"', page.text)
    assert {"playground/app.js", "playground/style.css", "favicon.ico", "docs"} <= set(addresses)
    for address in addresses:
        assert behind.get(urljoin("/prefix/", address)).status_code == 200, address


def test_it_is_not_part_of_the_api_document(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert not [path for path in paths if path.startswith("/playground")]
    assert "get" not in paths["/"]


def test_the_page_is_told_whether_the_model_can_chat(client: TestClient, make_chatty: MakeClient) -> None:
    assert client.get("/info").json()["chat_template"] is False
    assert make_chatty().get("/info").json()["chat_template"] is True

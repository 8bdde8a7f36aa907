"""The pages of the documents' site that are made while it is built: a hook of mkdocs (docs/site/mkdocs.yml).

README.md is the first page and CHANGELOG.md the last; ``reference.md`` is written from the app's OpenAPI.
"""

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from api_reference import reference

ROOT = Path(__file__).resolve().parent.parent

_LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(#[^)\s]*)?(?=\))")
_WHOLE = re.compile(r"(?<!!)\[([^\]]*)\]\((\.\./[^)\s]*)\)")
_TOP = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}
"""Documents at the top of the repository, and their pages."""


def on_files(files: Any, config: Any) -> Any:
    """Adds the made pages."""
    from mkdocs.structure.files import File

    pages = {page: _from_top((ROOT / name).read_text()) for name, page in _TOP.items()}
    pages["reference.md"] = reference(_openapi())
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links to the top's documents become links to their pages; those to source files become plain text."""
    to_top = "../" * (page.file.src_uri.count("/") + 1)
    for name, target in _TOP.items():
        markdown = markdown.replace(f"]({to_top}{name}", f"]({target}")
    return _WHOLE.sub(lambda link: link[1] if _is_outside(link[2], to_top) else link[0], markdown)


def _is_outside(target: str, to_top: str) -> bool:
    return target.startswith(to_top)


def _from_top(text: str) -> str:
    """A document of the repository's top with its links relative to docs/."""

    def moved(link: re.Match[str]) -> str:
        path, anchor = link[1], link[2] or ""
        if path.startswith("docs/"):
            return path.removeprefix("docs/") + anchor
        return _TOP.get(path, f"../{path}") + anchor

    return _LINK.sub(moved, text)


def _openapi() -> dict[str, Any]:
    from server.app import create_app
    from server.settings.server import Settings

    document: dict[str, Any] = create_app(Settings(device="cpu")).openapi()
    return document

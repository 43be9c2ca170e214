"""
What the site's build adds to the pages in this folder.

1. CHANGELOG.md, CONTRIBUTING.md and SECURITY.md, which belong at the top of the repository, become pages.
2. A link to a file of the repository that is no page becomes plain text: the site may be read where the repository is not.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

TOP = Path(__file__).parents[1]
#: Pages by the file at the top of the repository that they are made of.
PROJECT = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md"}
_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the project."""
    for name, page in PROJECT.items():
        files.append(File.generated(config, page, content=(TOP / name).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return the page's text with its links as the site has them."""
    del config
    here = page.file.src_uri
    names = {target: name for name, target in PROJECT.items()}
    origin = TOP / names[here] if here in names else TOP / "docs" / here

    def linked(found: re.Match[str]) -> str:
        target = Path(os.path.normpath(origin.parent / found[2]))
        if not target.exists():
            return found[0]  # the build names it
        place = PROJECT.get(target.name, "") if target.parent == TOP else os.path.relpath(target, TOP / "docs")
        if not files.get_file_from_path(place):
            return found[1]
        return f"[{found[1]}]({posixpath.relpath(place, posixpath.dirname(here) or '.')}{found[3] or ''})"

    return _LINK.sub(linked, markdown)

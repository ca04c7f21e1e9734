"""Hooks of mkdocs for the parts of the site beyond the pages: the navigation, and the pages that lie outside this folder.

The navigation follows from the tables of README.md. Pages of the repository that the documentation links to, such as SECURITY.md, become
pages of the site. Links to other files, such as modules, become plain text, because the site does not hold them.
"""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
#: Pages outside of docs/, by their place in the site. README.md is there twice: that of the repository is `about.md`.
OUTSIDE = {
    "about.md": ROOT / "README.md",
    "CONTRIBUTING.md": ROOT / "CONTRIBUTING.md",
    "SECURITY.md": ROOT / "SECURITY.md",
    "CHANGELOG.md": ROOT / "CHANGELOG.md",
    "measurements.md": ROOT / "bench" / "NOTES.md",
}
_PLACES = {path: place for place, path in OUTSIDE.items()}

_HEADING = re.compile(r"^## (.+)$")
_ROW = re.compile(r"^\| \[([^\]]+)\]\(([^)#]+)\)")
_LINK = re.compile(r"(?<!`)(!?)\[([^\]]*)\]\(([^)\s]+)\)")
_CODE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Make the navigation from the tables of README.md."""
    sections: list[tuple[str, list[dict[str, str]]]] = []
    for line in (ROOT / "docs" / "README.md").read_text().split("\n"):
        if heading := _HEADING.match(line):
            sections.append((heading[1], []))
        elif (row := _ROW.match(line)) and (place := _place(_target(ROOT / "docs", row[2]))):
            sections[-1][1].append({row[1]: place})
    config.nav = [{"Home": "README.md"}, {"About lmaas": "about.md"}, *({name: pages} for name, pages in sections)]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside of docs/."""
    for place, path in OUTSIDE.items():
        files.append(File.generated(config, place, content=path.read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Make the links of a page links of the site."""
    place = page.file.src_uri
    source = OUTSIDE.get(place, ROOT / "docs" / place)
    parts = _CODE.split(markdown)
    return "".join(part if part.startswith("```") else _LINK.sub(lambda found: _link(found, source, place), part) for part in parts)


def _link(found: re.Match[str], source: Path, place: str) -> str:
    """Return a link as the site needs it."""
    picture, text, target = found.groups()
    path, hash_sign, anchor = target.partition("#")
    if "://" in target or target.startswith("mailto:") or not path:
        return found[0]
    destination = _place(_target(source.parent, path))
    if destination is None:
        return text
    return f"{picture}[{text}]({os.path.relpath(destination, os.path.dirname(place) or '.')}{hash_sign}{anchor})"


def _target(folder: Path, path: str) -> Path:
    """Return the file that a link from a folder leads to. Raises PluginError if there is none, which ends the build."""
    target = Path(os.path.normpath(folder / path))
    if not target.exists():
        raise PluginError(f"A page in {folder.relative_to(ROOT)} links to {path}, which does not exist.")
    return target


def _place(target: Path) -> str | None:
    """Return the place of a file in the site, if it is there."""
    docs = ROOT / "docs"
    if target in _PLACES:
        return _PLACES[target]
    return target.relative_to(docs).as_posix() if target.is_relative_to(docs) and target.is_file() else None

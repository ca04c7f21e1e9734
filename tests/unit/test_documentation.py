"""The documentation is consistent: links resolve, files that are mentioned exist, generated pages are up to date."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmaas.config_documentation import page as settings_page

ROOT = next(parent for parent in Path(__file__).parents if (parent / "pyproject.toml").exists())
FOLDERS = ("lmaas", "docs", "tests", "bench", "loadtest", "tenants", "docker", "deploy", "examples", "migrations", "requirements", ".ci")
TEXT = frozenset({".md", ".py", ".lua", ".cpp", ".toml", ".yaml", ".yml", ".sh", ".cfg", ".in", ".json", ".example", ""})
README_WORDS = 650
#: The four kinds of pages, each a folder of docs/.
KINDS = frozenset({"concepts", "how-to", "tutorials", "reference"})
ARCHITECTURE = ROOT / "docs" / "concepts" / "architecture.md"
SETTINGS = ROOT / "docs" / "reference" / "settings.md"

LINK = re.compile(r"(?<!`)\[[^\]\n]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)
CODE_BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
TABLE = re.compile(r"^(\|.*\|)\n\| *-", re.MULTILINE)
DOCUMENT = re.compile(r"[\w./-]*[\w-]\.md\b")
QUOTED_PATH = re.compile(r"`((?:lmaas|tests|docs|bench|loadtest|migrations|tenants|docker|deploy|examples|requirements)/[\w./*-]+)`")
#: Files that commands write, and files that users may add.
WRITTEN = frozenset({"bench/results.json", "loadtest/report.html", "tenants/models/", "tenants/models/*.yaml"})
MODULE = re.compile(r"[\w/]+\.(?:py|lua)\b")


@functools.cache
def files() -> list[Path]:
    """Return the text files of the repository, without environments, caches and results."""
    found = [path for path in ROOT.iterdir() if path.is_file()]
    for folder in FOLDERS:
        found += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    return sorted(path for path in found if path.suffix in TEXT and "__pycache__" not in path.parts and ".training" not in path.parts)


def pages() -> list[Path]:
    """Return the pages in Markdown."""
    return [path for path in files() if path.suffix == ".md"]


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title) for title in HEADING.findall(CODE_BLOCK.sub("", text)))
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in plain}


def name(path: Path) -> str:
    """Return a path as failures show it."""
    return str(path.relative_to(ROOT))


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """Return the file and the anchor of each relative link of a page."""
    for target in LINK.findall(CODE_BLOCK.sub("", page.read_text())):
        if "://" not in target and not target.startswith("mailto:"):
            path, _, anchor = target.partition("#")
            yield (page.parent / path).resolve() if path else page, anchor


@pytest.mark.parametrize("page", pages(), ids=name)
def test_links_resolve(page: Path) -> None:
    for target, anchor in links(page):
        assert target.exists(), f"{name(page)} links to {target}, which does not exist"
        if anchor:
            assert anchor in anchors(target.read_text()), f"{name(page)} links to {name(target)}#{anchor}, which has no such heading"


def test_each_page_is_in_a_folder_for_its_kind() -> None:
    assert [path.name for path in (ROOT / "docs").glob("*.md")] == ["README.md"]
    assert {path.name for path in (ROOT / "docs").iterdir() if path.is_dir()} == KINDS | {"decisions", "images"}


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "README.md"], ids=name)
def test_the_indexes_have_links(page: Path) -> None:
    assert len(list(links(page))) > 20


def test_every_document_that_is_mentioned_exists() -> None:
    """Paths begin at the root, at the file that mentions them, or at the folder of the generated pages."""
    present = {path.name for path in pages()} | {"README.md"}
    missing = {
        f"{name(path)}: {document}"
        for path in files()
        # This file has examples, and the site has pages that are written when it is built.
        if path not in (Path(__file__), ROOT / "docs" / "site.py")
        for document in (found.lstrip("/") for found in DOCUMENT.findall(path.read_text(errors="replace")))
        if document.rpartition("/")[2] not in present
        or ("/" in document and not any((folder / document).exists() for folder in (ROOT, path.parent, SETTINGS.parent)))
    }
    assert missing == set()


def test_every_path_in_a_page_exists() -> None:
    """The changelog is left out, because it mentions files of the past."""
    missing = {
        f"{name(page)}: {path}"
        for page in pages()
        if page.name != "CHANGELOG.md"
        for path in QUOTED_PATH.findall(page.read_text())
        if path not in WRITTEN and not any(ROOT.glob(path.rstrip("/")))
    }
    assert missing == set()


def test_nothing_refers_outside_the_repository() -> None:
    outside = ["../" + "shared", "shared/" + "design"]
    assert [name(path) for path in files() if any(text in path.read_text(errors="replace") for text in outside)] == []


def test_every_module_of_the_architecture_exists() -> None:
    text = ARCHITECTURE.read_text()
    known = {path.relative_to(ROOT / "lmaas").as_posix() for path in (ROOT / "lmaas").rglob("*") if path.suffix in (".py", ".lua")}
    known |= {path.rpartition("/")[2] for path in known}
    assert {module.removeprefix("lmaas/") for module in MODULE.findall(text)} - known == set()


def test_every_function_of_the_architecture_exists() -> None:
    text = ARCHITECTURE.read_text()
    sources = "".join(path.read_text() for path in (ROOT / "lmaas").rglob("*") if path.suffix in (".py", ".lua"))
    named = {found.rpartition(".")[2] for found in re.findall(r"[(,] ?`([A-Za-z_.]+)`[),]", text)}
    assert len(named) > 10
    assert {
        function for function in named if not re.search(rf"(?:def|class|function) {function}\b|\b{function} = |\b{function}: ", sources)
    } == set()


def test_the_architecture_names_every_folder() -> None:
    text = ARCHITECTURE.read_text()
    folders = {path.parent.relative_to(ROOT / "lmaas").as_posix() for path in (ROOT / "lmaas").rglob("__init__.py")} - {"."}
    assert {folder for folder in folders if f"`{folder}/`" not in text} == set()


def test_every_folder_says_what_it_is_for() -> None:
    without = [name(path) for path in (ROOT / "lmaas").rglob("__init__.py") if not ast.get_docstring(ast.parse(path.read_text()))]
    assert without == []


@pytest.mark.parametrize("folder", ["decisions", *sorted(KINDS)])
def test_every_page_is_in_its_index(folder: str) -> None:
    index = ROOT / "docs" / (f"{folder}/README.md" if folder == "decisions" else "README.md")
    listed = {target for target, _ in links(index)}
    assert {name(page) for page in (ROOT / "docs" / folder).glob("*.md")} - {name(page) for page in listed} - {name(index)} == set()


def test_every_column_of_a_table_has_a_heading() -> None:
    """The first column is left out, because its cells may be headings of the rows."""
    without = {
        f"{name(page)}: {row}"
        for page in pages()
        if page.is_relative_to(ROOT / "docs")
        for row in TABLE.findall(CODE_BLOCK.sub("", page.read_text()))
        if not all(cell.strip() for cell in row.strip().strip("|").split("|")[1:])
    }
    assert without == set()


def test_pages_have_no_html_links_and_load_nothing() -> None:
    """The site checks links in Markdown only, and its theme would load the library for diagrams from another server."""
    text = {name(page): CODE_BLOCK.sub(lambda block: block[0].split("\n", 1)[0], page.read_text()) for page in pages()}
    assert {page for page, found in text.items() if re.search(r"<a |<img |<script|^```mermaid", found, re.MULTILINE)} == set()


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= README_WORDS


def test_the_settings_page_is_generated() -> None:
    assert SETTINGS.read_text() == settings_page(), f"run: python -m lmaas.config_documentation > {name(SETTINGS)}"


def test_the_licence_is_the_one_that_is_declared() -> None:
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text()
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text

"""The tiers of the tests stay separate, and the README of the tests names only existing files."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
TIERS = ("unit", "integration", "system")
#: The parts of `tests` that each part may import.
MAY_IMPORT = {
    "support": {"support"},
    "unit": {"support", "unit"},
    "integration": {"support", "integration"},
    "system": {"support", "integration", "system"},
}
README = (TESTS / "README.md").read_text()
NAMED = re.compile(r"`((?:unit|integration|system|support)/[\w./*]+)(?:::(\w+)(…?))?`")


def imported(path: Path) -> Iterator[str]:
    """The parts of `tests` that a module imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            if name.startswith("tests."):
                yield name.split(".")[1]


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_a_tier_imports_none_above_it(part: str) -> None:
    wrong = {
        f"{path.relative_to(TESTS)} imports tests.{name}"
        for path in (TESTS / part).rglob("*.py")
        for name in imported(path)
        if name not in MAY_IMPORT[part] | {"__main__"}
    }
    assert wrong == set()


def test_every_test_is_in_a_tier() -> None:
    assert {path.relative_to(TESTS).parts[0] for path in TESTS.rglob("test_*.py")} == set(TIERS)


@pytest.mark.parametrize(("path", "test", "more"), sorted(set(NAMED.findall(README))))
def test_what_the_readme_names_exists(path: str, test: str, more: str) -> None:
    found = list(TESTS.glob(path.rstrip("/")))
    assert found, f"tests/README.md names {path}, which does not exist"
    if test:
        names = re.findall(r"^(?:async )?def (test_\w+)", found[0].read_text(), re.MULTILINE)
        assert any(name.startswith(test) if more else name == test for name in names), f"{path} has no test {test}"


def test_the_readme_names_many_tests() -> None:
    assert len(NAMED.findall(README)) > 40

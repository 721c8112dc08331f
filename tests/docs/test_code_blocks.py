"""The programs in README.md and docs/ run as they stand, on the tiny model in place of the one they name."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def blocks() -> list[tuple[str, str]]:
    """Give every Python block of every page with its name."""
    found: list[tuple[str, str]] = []
    for page in PAGES:
        codes = BLOCK.findall(page.read_text(encoding="utf-8"))
        found += [(f"{page.stem}-{number}", code) for number, code in enumerate(codes, 1)]
    return found


def programs() -> list[tuple[str, str]]:
    """Pick the blocks that are whole programs: they make a service of their own and do something with it."""
    return [(name, code) for name, code in blocks() if "ServiceClient() as" in code and "\n    ...\n" not in code]


@pytest.mark.parametrize(("name", "code"), blocks(), ids=[name for name, _ in blocks()])
def test_block_is_python(name: str, code: str) -> None:
    """Every block parses; an ``await`` may stand at the top, as in a notebook."""
    compile(code, name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("name", "code"), programs(), ids=[name for name, _ in programs()])
def test_program_runs(name: str, code: str, tmp_path: Path) -> None:
    """A reader who pastes a program into a file and runs it sees it end well, and without a warning."""
    script = tmp_path / f"{name}.py"
    script.write_text(code.replace("tg-tinker/smollm2-135m", "tg-tinker/tiny"), encoding="utf-8")
    environment = os.environ | {"TG_TINKER_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        capture_output=True,
        check=False,
        env=environment,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """A link to a file of this repository leads to one that is there."""
    targets = LINK.findall(page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []

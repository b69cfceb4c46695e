"""The pages of the documentation: what names one names one that is there."""

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
NAMED = re.compile(r"\bdocs/[\w/]+\.md(?:#[\w-]+)?")
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(((?!https?:)[^)\s]+)\)")


def without_code(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page):
    """The anchors of a page's headings, as GitHub and MyST make them."""
    text = without_code(page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def is_there(page, anchor):
    return page.is_file() and (not anchor or anchor in anchors(page))


def sources():
    for folder in ("src", "data_modules", "experiments", "benchmarks"):
        yield from (p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".yaml", ".html", ".sbatch"))
    yield from (ROOT / name for name in ("Makefile", "README.md", "CONTRIBUTING.md"))


def test_every_page_that_a_file_names_is_there():
    found = {
        (str(path.relative_to(ROOT)), named)
        for path in sources()
        for named in NAMED.findall(path.read_text(encoding="utf-8"))
    }
    assert len(found) > 20
    assert [
        (path, named) for path, named in found if not is_there(ROOT / named.split("#")[0], named.partition("#")[2])
    ] == []


@pytest.mark.parametrize("path", [*PAGES, ROOT / "README.md", ROOT / "CHANGELOG.md"], ids=lambda path: path.name)
def test_every_link_leads_to_a_page_and_a_heading(path):
    broken = []
    for target in LINK.findall(without_code(path.read_text(encoding="utf-8"))):
        name, _, anchor = target.partition("#")
        page = path.parent / name if name else path
        if not (page.is_file() if page.suffix != ".md" else is_there(page, anchor)):
            broken.append(target)
    assert broken == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1000


def test_every_page_is_in_the_index():
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    listed = {line for block in re.findall(r"```\{toctree\}(.*?)```", index, re.DOTALL) for line in block.split()}
    assert {page.stem for page in PAGES} - {"index"} <= listed


def test_every_option_table_is_between_its_markers():
    for name in ("pam", "sce"):
        text = (ROOT / f"docs/{name}.md").read_text(encoding="utf-8")
        marks = re.findall(r"<!-- (options: \w+|end options) -->", text)
        assert len(marks) >= 2
        assert all(mark.startswith("options") for mark in marks[::2])
        assert set(marks[1::2]) == {"end options"}
        assert len(set(marks[::2])) == len(marks[::2])


def test_the_python_page_runs_and_the_walk_fills_the_square():
    first, second = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(encoding="utf-8"), re.DOTALL)
    assert "run.predict(" in first  # tests/test_end_to_end.py runs it
    held: dict[str, Any] = {}
    exec(second, held)
    found = held["refined"][0, 0] > 0.75
    assert found[20:40, 25:45].all()
    assert found.sum() == 20 * 20

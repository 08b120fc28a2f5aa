"""The written pages: links lead somewhere, and the README's figures are those that are recorded."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("doc/*.md"), *ROOT.glob("benchmarks/*.md")]


def anchors_of(page):
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text()
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for target in targets:
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors_of(file), target


def precision_rows(page, heading):
    """Return the rows of a section's tables by what they are of: both speed-ups, precision@1 and @16."""
    rows, name = {}, ""
    section = page.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    for line in section.splitlines():
        row = [cell.strip() for cell in line.strip("|").split("|")]
        if len(row) >= 6 and "±" in row[4]:
            name = row[0] or name
            rows[name, row[1]] = row[2:6]
    return rows


def test_the_readme_shows_what_is_recorded():
    recorded = precision_rows(ROOT / "benchmarks/results/paper-summary.md", "Closed set")
    shown = precision_rows(ROOT / "README.md", "Precision")
    names = {"Fashion-MNIST": "fashion_mnist", "UCI letters": "letters"}
    assert len(shown) == 20
    for (data, system), row in shown.items():
        data = data.partition(", ")[0]
        assert row == recorded[f"{names.get(data, data)}, proxy", system], (data, system)

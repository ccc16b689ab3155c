"""The documentation as a site: whole, without network, and strict about links and navigation."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import safer_fast

pytest.importorskip("mkdocs", reason='the site needs pip install "safer_fast[docs]"')
pytest.importorskip("material", reason='the site needs pip install "safer_fast[docs]"')
pytest.importorskip("mkdocstrings", reason='the site needs pip install "safer_fast[docs]"')

ROOT = Path(__file__).parents[2]
WITHOUT_NETWORK = """
import socket, sys
def refuse(*_):
    raise OSError("the site is built without network")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
from mkdocs.__main__ import cli
cli(sys.argv[1:])
"""


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Build the site of a checkout as `make docs` does, in a process that no connection leaves."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_NETWORK, "build", "--strict", "--site-dir", str(site)],
        cwd=root,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def site(once: Any) -> Path:
    """The site of this checkout."""

    def fill(folder: Path) -> None:
        result = build(ROOT, folder)
        assert result.returncode == 0, result.stderr[-4000:]

    return Path(once("site", fill))


class Resources(HTMLParser):
    """Addresses that a browser fetches to show a page: scripts, styles, images, fonts."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = {"script": "src", "img": "src", "iframe": "src", "link": "href"}
        self.found += [value or "" for name, value in attrs if name == names.get(tag)]


def test_every_page_is_built_and_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = {page.name for page in site.glob("*.html")}
    names = [page.stem for page in (ROOT / "docs").glob("*.md")]
    assert {f"{name}.html" for name in [*names, "index", "contributing", "changelog"]} <= pages
    for page in site.glob("*.html"):
        text = page.read_text()
        resources = Resources()
        resources.feed(text)
        assert [each for each in resources.found if re.match(r"(https?:)?//", each)] == []
        # the theme's script would fetch a library for these
        assert 'class="mermaid"' not in text


def test_the_site_has_a_search_and_every_public_name(site: Path) -> None:
    api = (site / "api.html").read_text()
    for name in set(safer_fast.__all__) - {"__version__"}:
        assert f'id="safer_fast.{name}"' in api, name
    assert "catastrophic overfitting" in (site / "search" / "search_index.json").read_text()


def test_links_of_the_readme_lead_to_pages(site: Path) -> None:
    index = (site / "index.html").read_text()
    assert 'href="data.html"' in index
    assert 'href="docs/' not in index


def test_a_page_has_one_place_in_the_navigation(site: Path) -> None:
    index = (site / "index.html").read_text()
    pages = re.findall(r'href="([a-z-]+\.html)" class="md-nav__link"', index)
    assert "results.html" in pages
    assert len(pages) == len(set(pages))


def test_a_broken_link_and_a_page_without_a_place_in_the_navigation_end_the_build(
    tmp_path: Path,
) -> None:
    for name in ("mkdocs.yml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("safer_fast", "kernels", "bench"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    page = "# Lonely\n\n[a file](nowhere.md), [a heading](data.md#nowhere), [code](../nowhere.py)\n"
    (tmp_path / "docs" / "lonely.md").write_text(page)
    result = build(tmp_path, tmp_path / "site")
    assert result.returncode != 0
    warnings = [line for line in result.stderr.splitlines() if "WARNING" in line]
    for words in ("'nowhere.md'", "'data.md#nowhere'", "'../nowhere.py'"):
        assert any("lonely.md" in line and words in line for line in warnings), result.stderr
    assert 'not included in the "nav"' in result.stderr
    assert "- lonely.md" in result.stderr

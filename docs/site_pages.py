"""Pages of the site that lie outside docs/, and links between them: a hook of mkdocs.yml."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "bench/README.md": "benchmarks.md",
}
"""Files of the repository, and the pages that they become."""
_LINK = re.compile(r"(!?)\[([^]\n]*)\]\(([^)\s]+)\)")
_FENCE = re.compile(r"(^ *```.*?^ *```|`[^`\n]+`)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie outside docs/."""
    for file, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / file).read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links between files of the repository into links between pages; code stays as it is."""
    parts = _FENCE.split(markdown)
    sources = {target: source for source, target in OUTSIDE.items()}
    folder = posixpath.dirname(sources.get(page.file.src_uri, f"docs/{page.file.src_uri}"))
    parts[::2] = [_LINK.sub(lambda link: _linked(link, folder), part) for part in parts[::2]]
    return "".join(parts)


def _linked(link: re.Match[str], folder: str) -> str:
    """The link as the site has it; one to a file that is no page becomes text with its path."""
    mark, text, address = link.groups()
    path, hash_sign, anchor = address.partition("#")
    if not path or "://" in path or path.startswith("mailto:"):
        return link[0]
    file = posixpath.normpath(posixpath.join(folder, path))
    target = OUTSIDE.get(file, file.removeprefix("docs/"))
    if target != file:
        return f"{mark}[{text}]({target}{hash_sign}{anchor})"
    return f"{text} (`{file}`)" if (ROOT / file).exists() else link[0]

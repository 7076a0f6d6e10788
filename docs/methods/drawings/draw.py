"""Writes a page for each diagram of FOLDER/*.md into WORK, and says which drawing it is for; see draw.sh."""

import hashlib
import html
import re
import sys
from pathlib import Path


def drawings(page: str) -> dict[str, str]:
    """Name of the drawing -> source. The name changes with the diagram: an old drawing never stands for a new one."""
    sources = re.findall(r"^```mermaid\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return {hashlib.sha256(source.encode()).hexdigest()[:16]: source for source in sources}


def main(folder: Path, work: Path) -> None:
    for page in sorted(folder.glob("*.md")):
        for name, source in drawings(page.read_text(encoding="utf-8")).items():
            (work / f"{name}.html").write_text(
                f"""<!doctype html><meta charset="utf-8"><pre class="mermaid">{html.escape(source)}</pre>
                <script src="package/dist/mermaid.min.js"></script>
                <script>mermaid.initialize({{startOnLoad: true, theme: "neutral", htmlLabels: false,
                         flowchart: {{htmlLabels: false, useMaxWidth: true}}}})</script>"""
            )
            print(work / f"{name}.html", f"{name}.svg")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

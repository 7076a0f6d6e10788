"""Writes a page for each diagram of FOLDER/*.md into WORK, and says which drawing it is for; see draw.sh."""

import hashlib
import html
import re
import sys
from pathlib import Path

folder, work = Path(sys.argv[1]), Path(sys.argv[2])
for page in sorted(folder.glob("*.md")):
    for source in re.findall(r"^```mermaid\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        name = hashlib.sha256(source.encode()).hexdigest()[:16]
        (work / f"{name}.html").write_text(
            f"""<!doctype html><meta charset="utf-8"><pre class="mermaid">{html.escape(source)}</pre>
            <script src="package/dist/mermaid.min.js"></script>
            <script>mermaid.initialize({{startOnLoad: true, theme: "neutral", htmlLabels: false,
                     flowchart: {{htmlLabels: false, useMaxWidth: true}}}})</script>"""
        )
        print(work / f"{name}.html", f"{name}.svg")

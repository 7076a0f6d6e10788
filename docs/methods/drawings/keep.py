"""Keeps of a rendered page (standard input) the drawing alone, without what changes from run to run; see draw.sh."""

import re
import sys

drawing = re.search(r"<svg.*</svg>", sys.stdin.read(), re.DOTALL)
if drawing is None:
    sys.exit("nothing was drawn")
text = drawing[0].replace("<br>", "<br/>")
text = re.sub(r' data-[\w-]+="[^"]*"', "", text)
text = re.sub(r"mermaid-\d+", "drawing", text)
text = re.sub(r"(\d\.\d)\d+", r"\1", text)
text = re.sub(r"@keyframes[^{]*\{[^{}]*\{[^{}]*\}\s*\}", "", text)
print(text)

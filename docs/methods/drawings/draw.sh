#!/bin/bash
# Draws the mermaid diagrams of docs/methods/*.md anew, as SVG that no reader has to compute or to fetch anything for.
# Needs python3, npm and Chromium (CHROMIUM=...); the network once, for mermaid.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
(cd "$work" && npm pack --silent mermaid@11 >/dev/null && tar xzf mermaid-*.tgz package/dist/mermaid.min.js)
rm -f "$here"/*.svg
python3 "$here/draw.py" "$here/.." "$work" | while read -r page picture; do
    "${CHROMIUM:-chromium}" --headless --no-sandbox --disable-gpu --disable-sync --disable-background-networking \
        --allow-file-access-from-files --user-data-dir="$work/profile" --virtual-time-budget=10000 \
        --dump-dom "file://$page" 2>/dev/null | python3 "$here/keep.py" > "$here/$picture"
    echo "drew $picture"
done

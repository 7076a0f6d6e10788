"""The report in a browser: nothing is fetched, nothing fails, and the sliders move the slices."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from report_reader import read_page

from voxtrast.engine.reporting import page
from voxtrast.engine.reporting.planes import frame_of
from voxtrast.engine.reporting.slices import Tile, leaf_through

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed to open the report in"),
]


def open_page(path: Path, folder: Path, *words: str) -> tuple[str, str, list[str]]:
    """The page's elements after its script ran, what the browser complained about, and what the page asked for."""
    traffic = folder / "traffic.json"
    command = [str(BROWSER), *QUIET, f"--user-data-dir={folder / 'profile'}", f"--log-net-log={traffic}",
               "--enable-logging=stderr", *words, "--dump-dom", path.as_uri()]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=120, check=True)
    said = "\n".join(line for line in ran.stderr.splitlines() if "CONSOLE" in line)
    events = json.loads(traffic.read_text(encoding="utf-8"))["events"]
    known = (event.get("params", {}) for event in events)
    # A browser also asks for things of its own, which no page has initiated.
    asked = [str(each["url"]) for each in known if each.get("initiator", "not an origin") != "not an origin"]
    return ran.stdout, said, [url for url in asked if not url.startswith(("file:", "data:"))]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    volume = np.random.default_rng(0).random((6, 8, 10), np.float32)
    affine = ((0.0, 0.0, 1.0, 0.0), (0.0, 1.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0))
    html = leaf_through("case", frame_of(affine, (1.0, 1.0, 1.0)), [Tile("image", volume), Tile("other", volume)])
    text = page.render("title", "", [page.Section("Features", [html, page.colour_key("0", "1", ["#000", "#fff"])])])
    path = tmp_path_factory.mktemp("browser") / "report.html"
    path.write_text(text)
    read_page(path)
    return path


def test_nothing_is_fetched_and_nothing_fails(path: Path, tmp_path: Path) -> None:
    elements, said, asked = open_page(path, tmp_path)
    assert said == ""
    assert asked == []
    assert len(re.findall(r'<label class="slider">', elements)) == 3  # shown by the script
    assert re.findall(r"<output>(.*?)</output>", elements)[0].endswith(" of 6")


def test_the_browser_would_have_told(path: Path, tmp_path: Path) -> None:
    """What the page's own policy forbids is said and not asked for; without the policy it would be."""
    broken = tmp_path / "broken.html"
    text = path.read_text(encoding="utf-8").replace(
        "</main>", '<img alt="" src="http://localhost:9/picture.png"></main>'
    )
    broken.write_text(text.replace("</script>", "nothing.fails();</script>"))
    _, said, asked = open_page(broken, tmp_path)
    assert "Content Security Policy" in said
    assert "nothing is not defined" in said
    assert asked == []
    broken.write_text(text.replace(page.POLICY, ""))
    assert open_page(broken, tmp_path)[2] == ["http://localhost:9/picture.png"]


def test_without_scripts_the_sliders_are_hidden(path: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.html"
    plain.write_text(path.read_text(encoding="utf-8").replace("script-src 'unsafe-inline'", "script-src 'none'"))
    elements, _, _ = open_page(plain, tmp_path)
    assert len(re.findall(r'<label class="slider" hidden="">', elements)) == 3


def test_planes_share_a_scale_where_there_is_room_and_fit_where_there_is_little(path: Path, tmp_path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    measure = (
        'document.title = [...document.querySelectorAll(".window")].map(e => e.getBoundingClientRect())'
        '.map(r => `${Math.round(r.width)}x${Math.round(r.height)}`).join(" ");</script>'
    )
    sizes = {}
    for name, width in (("wide", 1200), ("phone", 190)):
        page_of = tmp_path / f"{name}.html"
        page_of.write_text(text.replace("</script>", measure).replace("<main", f'<main style="width:{width}px"', 1))
        elements, said, _ = open_page(page_of, tmp_path, "--window-size=1280,900")
        assert said == ""
        sizes[name] = re.findall(r"<title>(.*?)</title>", elements)[0].split(" ")
    # 6 x 8 x 10 voxels, two volumes: 300 px for ten of them; with 190 px in all, half of what two tiles leave
    assert sizes["wide"] == ["300x240"] * 2 + ["300x180"] * 2 + ["240x180"] * 2
    assert sizes["phone"] == ["91x73"] * 2 + ["91x55"] * 2 + ["76x57"] * 2


def test_a_slider_moves_every_volume_of_its_plane(path: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved.html"
    move = 'const i = document.querySelector("input"); i.value = 4; i.dispatchEvent(new Event("input"));</script>'
    moved.write_text(path.read_text(encoding="utf-8").replace("</script>", move))
    elements, said, _ = open_page(moved, tmp_path)
    assert said == ""
    tops = [int(top) for top in re.findall(r"top: (-?\d+)%", elements)]
    assert tops[:2] == [-400, -400]
    assert tops[2:4] != tops[:2]
    assert re.findall(r"<output>(.*?)</output>", elements)[0] == "5 of 6"

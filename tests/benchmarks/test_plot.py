"""That the picture shows the newest measurements of one device, and that it is written."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from voxtrast.benchmarks.kernels.plot import SUBJECTS, draw, main, newest

OP = SUBJECTS["info_nce"].op


def line(size: int, date: str, median: float, **other: Any) -> dict[str, Any]:
    shape = {"problems": other.pop("problems", 1), "N": size, "C": other.pop("C", 64)}
    common = {"op": OP, "shape": shape, "date": date, "device": "here", "dtype": "float32", "commit": "0123abc"}
    return {**common, "provider": "ours", "median_s": median, "limit_s": median / 2, "peak_memory_mb": -0.1, **other}


OLD, NEW = "2026-01-01T00:00:00+00:00", "2026-02-01T00:00:00+00:00"
LINES = [
    line(4096, NEW, 4.0),
    line(2048, NEW, 2.0),
    line(2048, OLD, 1.0),  # later in the file, and older
    line(8192, OLD, 8.0, peak_memory_mb=None),
    line(2048, OLD, 3.0, provider="tile loop, tiles of 1024"),
    line(4096, OLD, 5.0, provider="tile loop, tiles of 2048"),
    line(4096, OLD, 9.0, device="elsewhere"),
    line(4096, OLD, 9.0, dtype="bfloat16"),
    line(4096, NEW, 9.0, C=128),
    line(32, NEW, 9.0, problems=1024),
    line(4096, NEW, 9.0, op="nt_xent"),
    {key: value for key, value in line(8192, NEW, 9.0, cannot="holds the matrix").items() if key != "median_s"},
]


def test_the_newest_line_of_each_provider_and_size_is_drawn() -> None:
    found = [(entry["provider"], entry["shape"]["N"], entry["median_s"]) for entry in newest(LINES)]
    of_tiles = [("tile loop", 2048, 3.0), ("tile loop", 4096, 5.0)]  # the best tile is another one at each size
    assert sorted(found) == [("ours", 2048, 2.0), ("ours", 4096, 4.0), ("ours", 8192, 8.0), *of_tiles]


def test_of_local_correlation_cubes_are_drawn_and_no_other_work() -> None:
    def cube(size: int, **other: Any) -> dict[str, Any]:
        shape = {"D": size, "H": size, "W": other.pop("W", size), "B": 1, "units": 1, "radius": other.pop("radius", 2)}
        return line(0, NEW, 1.0, **{"op": "local_correlation", "shape": shape, **other})

    lines = [cube(64), cube(32), cube(64, radius=3), cube(64, W=32), cube(64, provider="MONAI", other_work=True)]
    found = newest([*LINES, *lines], SUBJECTS["local_correlation"])
    assert [(entry["provider"], entry["shape"]["D"], entry["shape"]["radius"]) for entry in found] == [
        ("ours", 32, 2),
        ("ours", 64, 2),
    ]


def test_nothing_timed_is_said() -> None:
    with pytest.raises(ValueError, match="found none; run `voxtrast bench kernels`"):
        newest(LINES[-2:])


def test_a_picture_is_written_from_a_results_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results, picture = tmp_path / "results.jsonl", tmp_path / "pictures" / "here.png"
    results.write_text("".join(json.dumps(entry) + "\n" for entry in LINES))
    assert main([str(results), str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000


def test_a_missing_file_is_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.jsonl"), str(tmp_path / "none.png")]) == 2
    assert "none.jsonl" in capsys.readouterr().err


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match=r"the plot needs voxtrast\[report\]"):
        draw(LINES, tmp_path / "none.png")


def test_the_benchmarks_do_not_import_matplotlib() -> None:
    check = "import sys, voxtrast.benchmarks.kernels.__main__; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0

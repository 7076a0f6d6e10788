"""What was measured as JSON lines and as a table."""

import statistics
from typing import Any

from ..machine import Rates
from .geometry import Geometry
from .host import Turn
from .rows import OURS, ROWS, Setting

Line = dict[str, Any]


def lines_of(
    setting: Setting, turns: dict[str, list[Turn]], cannot: dict[str, str], geometry: Geometry, rates: Rates
) -> list[Line]:
    """A line for each row: medians over its turns, but for the first."""
    shared = {"op": "views", "shape": {"crop": setting.size}, "dtype": "float32", "workers": setting.workers}
    lines = []
    for name in [name for name in ROWS if name in turns or name in cannot]:
        row = ROWS[name]
        about = {**shared, "provider": name, "mode": "with reading" if row.reads else "from memory"}
        about["lacks"] = list(row.lacks)
        if name in cannot:
            lines.append({**about, "cannot": cannot[name]})
            continue
        found = {**about, **_medians(turns[name])}
        if OURS in turns:
            ours = _medians(turns[OURS])
            found["ratio_to_ours"] = ours["views_per_s"] / found["views_per_s"]
            found["core_ratio_to_ours"] = found["cpu_s_per_view"] / ours["cpu_s_per_view"]
        moved = geometry.moved_bytes[not row.lacks_field]
        limit = rates.limit(0.0, 0.0, moved)
        found |= {"moved_bytes": moved, "limit_s": limit, "share_of_limit": limit * found["views_per_s"]}
        lines.append({**found, "rates": vars(rates)})
    return lines


def _medians(turns: list[Turn]) -> Line:
    counted = turns[1:]
    rates = [turn.views_per_s for turn in counted]
    return {
        "views_per_s": statistics.median(rates),
        "spread_per_s": max(rates) - min(rates),
        "cpu_s_per_view": statistics.median(turn.cpu_seconds / turn.views for turn in counted),
        "peak_memory_mb": turns[0].peak_mb,
        "rounds": len(counted),
    }


def table(lines: list[Line], geometry: Geometry, rates: Rates) -> str:
    first, moved = lines[0], geometry.moved_bytes[True]
    limit_ms = rates.limit(0.0, 0.0, moved) * 1e3
    heads = f"{'views/s':>9}{'spread':>8}{'core, ms':>10}{'x slower':>10}{'x core':>8}{'limit':>7}{'MB':>7}  lacks"
    rows = [
        f"views of {first['shape']['crop']}^3, float32, {first['workers']} workers",
        f"  at the least {moved / 1e6:.1f} MB a view with its half of a field, "
        f"{limit_ms:.2f} ms at {rates.bandwidth / 1e9:.1f} GB/s",
        f"  {'':<24}{heads}",
    ]
    for line in lines:
        if "cannot" in line:
            rows.append(f"  {line['provider']:<24}cannot: {line['cannot']}")
            continue
        ratios = [line.get("ratio_to_ours"), line.get("core_ratio_to_ours")]
        memory = line["peak_memory_mb"]
        rows.append(
            f"  {line['provider']:<24}{line['views_per_s']:>9.1f}{line['spread_per_s']:>8.1f}"
            f"{line['cpu_s_per_view'] * 1e3:>10.1f}{_number(ratios[0], 10, 2)}{_number(ratios[1], 8, 2)}"
            f"{line['share_of_limit']:>7.1%}{_number(memory, 7, 0)}  {', '.join(line['lacks'])}"
        )
    return "\n".join(rows)


def _number(value: float | None, width: int, digits: int) -> str:
    return " " * (width - 1) + "-" if value is None else f"{value:>{width}.{digits}f}"


def geometry_report(geometry: Geometry) -> str:
    if geometry.not_compared:
        return f"  geometry not compared: {geometry.not_compared}"
    found = ", ".join(
        f"{name} {difference:.1e} (rounding explains {explained:.1e})"
        for name, (difference, explained) in geometry.differences.items()
    )
    return f"  one affine without deformation, largest difference from ours in intensity ranges: {found}"


def parts_report(parts: dict[str, float], size: int) -> str:
    total = sum(parts.values())
    rows = [f"where the time goes, {size}^3: {total * 1e3:.1f} ms of a core a slot of two views"]
    rows += [f"  {part:<28}{seconds * 1e3:9.2f} ms {seconds / total:7.1%}" for part, seconds in parts.items()]
    return "\n".join(rows)

"""The table that `benchmark.py` prints."""

from typing import Any


def table(figures: dict[str, dict[str, Any]]) -> str:
    """Format the results of `benchmark.measure`, by method, as a Markdown table."""
    lines = [
        "| method | step time over plain | range | bound | peak memory over plain | first block | captured |",
        "|---|---|---|---|---|---|---|",
    ]

    def cell(row: dict[str, Any], name: str, form: str) -> str:
        return "" if row.get(name) is None else format(row[name], form)

    for name, row in figures.items():
        spread = f"{cell(row, 'lowest', '.2f')} to {cell(row, 'highest', '.2f')}" if "lowest" in row else ""
        cells = [name, cell(row, "ratio", ".3f"), spread, cell(row, "bound", ".3f"), cell(row, "memory_ratio", ".3f")]
        cells += [cell(row, "first_block", ".1f"), cell(row, "captured", ".2f")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)

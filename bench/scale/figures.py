"""Figures, their goals and their gates: what is measured, what is wanted, and what a later run must not exceed (pure)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

MARGIN = 1.2
"""A gate is the mean of the recorded runs times this, as in the range files of Kueue."""

Runs = Mapping[str, Mapping[str, Sequence[float]]]
"""Measured values by part and figure."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured value; smaller is better."""

    name: str
    """What the range file calls it."""
    text: str
    value: float
    unit: str = ""
    digits: int = 2
    goal: float | None = None
    """The largest value that is wanted."""
    is_gated: bool = True
    """Whether a larger value than the recorded ones is a failure; what only explains the others is not."""

    def format(self, value: float | None) -> str:
        """Return a value with the figure's digits and unit."""
        return "" if value is None else f"{value:,.{self.digits}f} {self.unit}".strip()


def compute_gate(runs: Sequence[float]) -> float | None:
    """Return the largest value that passes, or None without a recorded run. Zero stays zero."""
    return MARGIN * sum(runs) / len(runs) if runs else None


def find_exceeded(part: str, figures: Iterable[Figure], *, recorded: Runs) -> list[str]:
    """Return a sentence for each figure that is beyond its gate."""
    gates = {name: compute_gate(runs) for name, runs in recorded.get(part, {}).items()}
    return [
        f"{part}: {each.text}: {each.format(each.value)} is more than the gate of {each.format(gate)}"
        for each in figures
        if each.is_gated and (gate := gates.get(each.name)) is not None and each.value > gate
    ]


def record(part: str, figures: Iterable[Figure], *, recorded: Runs) -> dict[str, dict[str, list[float]]]:
    """Return the recorded runs with one more."""
    copied = {part_: {name: list(runs) for name, runs in figures_.items()} for part_, figures_ in recorded.items()}
    mine = copied.setdefault(part, {})
    for each in figures:
        if each.is_gated:
            mine.setdefault(each.name, []).append(round(each.value, each.digits + 1))
    return copied


def format_table(part: str, figures: Sequence[Figure], *, recorded: Runs) -> str:
    """Return the figures of a part as a Markdown table."""
    gates = {name: compute_gate(runs) for name, runs in recorded.get(part, {}).items()}
    lines = [f"| {part} | Measured | Goal | Gate |", "| --- | ---: | ---: | ---: |"]
    for each in figures:
        goal = "" if each.goal is None else f"{'=' if each.goal == 0 else '<='} {each.format(each.goal)}"
        missed = " (missed)" if each.goal is not None and each.value > each.goal else ""
        gate = each.format(gates.get(each.name)) if each.is_gated else ""
        lines.append(f"| {each.text} | {each.format(each.value)}{missed} | {goal} | {gate} |")
    return "\n".join(lines)


def find_quantile(values: Sequence[float], share: float) -> float:
    """Return the value below which a share of all lies, in seconds or whatever they are; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0

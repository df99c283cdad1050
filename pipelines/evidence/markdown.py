"""Tables of Markdown for answers.md, and the words and numbers in their cells."""

from __future__ import annotations

from collections.abc import Sequence

from dit.analysis.comparison import Estimate
from dit.analysis.study import Place
from dit.analysis.verdicts import Judgement
from pipelines.report.words import counted


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table of Markdown, without the columns that are empty in every row; nothing if there are no rows."""
    kept = [index for index in range(len(columns)) if any(row[index] for row in rows)]
    if not kept:
        return []
    header, *body = (f"| {' | '.join(cells[index] for index in kept)} |" for cells in (columns, *rows))
    return [header, "|---" * len(kept) + "|", *body]


def by_rate(what: str, rates: Sequence[float]) -> list[str]:
    """Headers of one column for each rate: what a cell holds is said in the first one."""
    first, *others = (f"at rate {rate:g}" for rate in rates)
    return [f"{what} {first}", *others]


def size(found: Judgement | Estimate) -> str:
    """A mean relative difference and its interval, in per cent. Two seeds give no interval, and none give no difference."""
    if found.mean is None or not found.n:
        return "cannot be measured"
    if found.low is None or found.high is None:
        return f"{percent(found.mean)} %, from {counted(found.n, 'seed')}"
    return f"{percent(found.mean)} % [{percent(found.low)}, {percent(found.high)}]"


def percent(share: float) -> str:
    """A share in per cent with one decimal; a tiny share with one significant digit, so that its sign can be seen."""
    return f"{100 * share:+.1g}" if abs(share) < 0.0005 else f"{100 * share:+.1f}"


def p_value(p: float) -> str:
    """A p-value with two digits."""
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def words(place: Place) -> str:
    """The levels of a place."""
    return ", ".join(f"{factor} {level}" for factor, level in place)

"""Numbers as a reader wants them."""

from __future__ import annotations


def percent(share: float) -> str:
    """0.875 -> "87.5 %", with a space that does not break."""
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def number(value: int | None) -> str:
    """Thousands apart; "unknown" for None."""
    return "unknown" if value is None else f"{value:,}"


def duration(seconds: float) -> str:
    """Seconds up to two minutes, minutes up to two hours, then hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def short(count: int) -> str:
    """1_600_000 -> "1.6 million"; numbers below a million are written out."""
    return (
        f"{count / 1e9:.1f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million" if count >= 1e6 else f"{count:,}"
    )


def nats(loss: float) -> str:
    """A loss with three decimals; one that has run away in powers of ten."""
    return f"{loss:.3f}" if abs(loss) < 1e6 else f"{loss:.3g}"

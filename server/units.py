"""Numbers as people say them."""

__all__ = ["duration", "size"]


def duration(seconds: float) -> str:
    """Return a time span, its two largest units.

    Examples
    --------
    >>> duration(41.6), duration(200), duration(9000), duration(200_000)
    ('42 s', '3 min 20 s', '2 h 30 min', '2 d 7 h')
    """
    if 0 < seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for large, name, small, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= large:
            rest = whole % large // small
            return f"{whole // large} {name}" + (f" {rest} {smaller}" if rest else "")
    return f"{whole} s"


def size(count: float) -> str:
    """Return a number of bytes in decimal units, to three digits.

    Examples
    --------
    >>> size(12), size(454_412), size(2.5e9)
    ('12 B', '454 kB', '2.5 GB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"

"""Bandwidths as people write and read them: in bits per second, decimal."""

import re

from thresher.protos.errors import ConfigurationError


def read_rate(text: str) -> float:
    """Return the bandwidth that ``text`` says, in bytes per second.

    Raises:
        ConfigurationError: when it says none.

    >>> read_rate("100mbit"), read_rate("2.5 Gbit/s")
    (12500000.0, 312500000.0)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)bit(?:/s)?", text.strip(), re.IGNORECASE)
    rate = float(found[1]) * 1000 ** " kmgt".index(found[2].lower() or " ") / 8 if found else 0.0
    if rate <= 0:
        raise ConfigurationError(f"{text!r} is no bandwidth; write it as 100mbit, 2.5gbit or 800kbit")
    return rate


def rate_text(rate: float) -> str:
    """Return a bandwidth in bytes per second as text in bits.

    >>> rate_text(12_500_000.0), rate_text(60.0)
    ('100 Mbit/s', '480 bit/s')
    """
    bits = rate * 8
    for unit in ("", "k", "M", "G"):
        if bits < 999.5:  # 1000 in three digits
            return f"{bits:.3g} {unit}bit/s"
        bits /= 1000
    return f"{bits:.3g} Tbit/s"

"""Units of measurement: which are known, and their sizes."""

from __future__ import annotations

import re
from fractions import Fraction

_SIZES = """
length 1 m meter metre
length 0.01 cm centimeter centimetre
length 0.001 mm millimeter millimetre
length 1000 km kilometer kilometre
length 0.0254 in inch inches
length 0.3048 ft foot feet
length 0.9144 yd yard
length 1609.344 mi mile
mass 1 g gram
mass 0.001 mg milligram
mass 1000 kg kilogram
time 1 s sec second
time 0.001 ms millisecond
time 60 min minute
time 3600 h hr hour
time 86400 day
time 604800 week
volume 1 l liter litre
volume 0.001 ml milliliter millilitre
dollar 1 dollar usd buck
dollar 0.01 cent penny pennies
"""  # dimension, size in its base unit, names
_ALONE = """lb oz pound ounce hz rad kj ev kev mev au ly pc kpc mph kph kmh gal gallon euro acre pa kpa atm hp
mol kw cc unit degree"""  # compared with themselves only
UNITS = {name: (Fraction(1), name) for name in _ALONE.split()}
for _dimension, _size, *_names in map(str.split, _SIZES.strip().split("\n")):
    UNITS |= dict.fromkeys(_names, (Fraction(_size), _dimension))
CURRENCIES = {r"\$": "dollar", r"\euro": "euro", r"\pounds": "pound sterling"}
UNIT_LETTERS = frozenset("mgslLNJWVKCFhA")  # that are read as units behind a number and a space


def unit_size(unit: str) -> tuple[Fraction, tuple[tuple[str, int], ...], bool]:
    """Factor to the base units, dimensions with their powers, and whether every word is a known unit."""
    factor, is_known, sign = Fraction(1), True, 1
    powers: dict[str, int] = {}
    text = re.sub(r"\bper\b", "/", unit.casefold())
    text = re.sub(r"\b(?:square|sq)\s*\.?\s*([a-z]+)", r"\1^2", text)
    text = re.sub(r"\bcubic\s*([a-z]+)", r"\1^3", text)
    for word in re.findall(r"/|[a-z]+(?:\^-?\d+)?", text):
        if word == "/":
            sign = -1
            continue
        name, _, power = word.partition("^")
        exponent = sign * max(-9, min(9, int(power or 1)))
        singulars = (name, name.removesuffix("s"), name.removesuffix("es"))
        known = [UNITS[singular] for singular in singulars if singular in UNITS]
        is_known &= bool(known)
        own_dimension = name.removesuffix("s") if len(name) > 3 else name
        size, dimension = known[0] if known else (Fraction(1), own_dimension)
        factor *= size**exponent
        powers[dimension] = powers.get(dimension, 0) + exponent
    dimensions = sorted((name, power) for name, power in powers.items() if power)
    return factor, tuple(dimensions), is_known

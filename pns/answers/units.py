"""Units of measurement: which are known, and their sizes in base units."""

from __future__ import annotations

import re
from fractions import Fraction

_PREFIXES = {"p": -12, "n": -9, "u": -6, "m": -3, "c": -2, "d": -1, "h": 2, "k": 3, "M": 6, "G": 9, "T": 12}
_SIZES = """
1 length numcdk m meter metre
1e-10 length - angstrom
0.0254 length - in inch inches
0.3048 length - ft foot feet
0.9144 length - yd yard
1609.344 length - mi mile
0.001 mass umk g gram gramme
0.45359237 mass - lb lbs pound
1 time num s sec second
60 time - min minute
3600 time - h hr hour
86400 time - day
604800 time - week
1 current um A amp ampere
1 temperature m K kelvin
1 amount m mol mole
1 kg*m/s^2 mk N newton
1e-5 N - dyn dyne
1 N*m mkM J joule
1e-7 J - erg
3600000 J - kWh
1 J/s mkMG W watt
1 N/m^2 hkM Pa pascal
101325 Pa - atm
1 1/s kMGT Hz hertz
1 A*s unm C coulomb
1 J/C mkM V volt
1 V/A kM ohm
1 C/V pnum F farad
0.001 m^3 md l L liter litre
1 J*s/m^2/C mn T tesla
0.0001 T - gauss
1 mi/h - mph
1 km/h - kph kmh
1.602176634e-19 J kMG eV ev
4.184 J k cal calorie
149597870700 m - au
9460730472580800 m - ly
4046.8564224 m^2 - acre
3.785411784 L - gal gallon
0.000001 m^3 - cc
0.01 dollar - cent penny pennies
1 dollar - dollar usd buck
"""  # size, its dimension or the units that it is measured in, the prefixes of its symbol, names
_LONG_PREFIXES = {"milli": -3, "centi": -2, "kilo": 3, "mega": 6, "micro": -6, "nano": -9}
_ALONE = """oz ounce rad radian pc kpc mpc euro hp unit celsius fahrenheit ameridiem
pmeridiem"""  # compared with themselves only
CURRENCIES = {r"\$": "dollar", r"\euro": "euro", r"\pounds": "pound sterling"}
UNIT_LETTERS = frozenset("mgslLNJWVKCFhA")  # that are read as units behind a number and a space

_Unit = tuple[Fraction, dict[str, int]]  # factor to the base units, dimensions with their powers
UNITS: dict[str, _Unit] = {name: (Fraction(1), {name: 1}) for name in _ALONE.split()}


def unit_size(unit: str) -> tuple[Fraction, tuple[tuple[str, int], ...], bool]:
    """Factor to the base units, dimensions with their powers, and whether every word is a known unit."""
    factor, is_known, sign = Fraction(1), True, 1
    powers: dict[str, int] = {}
    text = re.sub(r"\bper\b", "/", unit, flags=re.IGNORECASE)
    text = re.sub(r"\b(?:square|sq)\s*\.?\s*([A-Za-z]+)", r"\1^2", text, flags=re.IGNORECASE)
    text = re.sub(r"\bcubic\s*([A-Za-z]+)", r"\1^3", text, flags=re.IGNORECASE)
    for word in re.findall(r"/|[A-Za-z]+(?:\s*\^\s*-?\d+)?", text):
        if word == "/":
            sign = -1
            continue
        name, _, power = re.sub(r"\s", "", word).partition("^")
        exponent = sign * max(-9, min(9, int(power or 1)))
        known = _known(name)
        is_known &= known is not None
        own_dimension = name.casefold().removesuffix("s") if len(name) > 3 else name.casefold()
        size, dimensions = known or (Fraction(1), {own_dimension: 1})
        factor *= size**exponent
        for dimension, times in dimensions.items():
            powers[dimension] = powers.get(dimension, 0) + times * exponent
    return factor, tuple(sorted((name, power) for name, power in powers.items() if power)), is_known


def _known(name: str) -> _Unit | None:
    """The unit of a name: a symbol as it is written, a word in any case and number."""
    word = name.casefold()
    names = (name, word, word.removesuffix("s"), word.removesuffix("es")) if len(name) > 1 else (name,)
    return next((UNITS[known] for known in names if known in UNITS), None)


for _row in _SIZES.strip().split("\n"):
    _size, _measure, _prefixes, *_names = _row.split()
    _factor, _dimensions, _is_known = unit_size(_measure)
    _powers = dict(_dimensions) if _is_known else {_measure: 1}
    _scaled = dict.fromkeys(_names, 0)
    if _prefixes != "-":
        _scaled |= {prefix + _names[0]: _PREFIXES[prefix] for prefix in _prefixes}
        _words = [name for name in _names if len(name) > 3]
        _scaled |= {long + name: power for long, power in _LONG_PREFIXES.items() for name in _words}
    UNITS |= {
        name: (_factor * Fraction(_size) * Fraction(10) ** power, _powers) for name, power in _scaled.items()
    }

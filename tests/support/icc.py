"""ICC profiles of version 2, as small as the format allows, and what their colours are in sRGB."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import numpy as np

Curve = Callable[[np.ndarray], np.ndarray]

# Colorants relative to D50, one row each for red, green and blue: Display P3 as Apple ships it, Adobe RGB
# (1998), and sRGB (IEC 61966-2-1, adapted as in its own profile).
DISPLAY_P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
_D50 = (0.96420, 1.0, 0.82491)


def srgb_to_linear(v: np.ndarray) -> np.ndarray:
    return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(v: np.ndarray) -> np.ndarray:
    return np.where(v <= 0.0031308, 12.92 * v, 1.055 * np.clip(v, 0, None) ** (1 / 2.4) - 0.055)


def matrix_profile(name: str, colorants: Sequence[Sequence[float]], curve: Curve) -> bytes:
    tags = {b"rXYZ": _xyz(colorants[0]), b"gXYZ": _xyz(colorants[1]), b"bXYZ": _xyz(colorants[2])}
    return _profile(name, b"RGB ", b"XYZ ", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), _curve(curve)))


def grey_profile(name: str, curve: Curve) -> bytes:
    return _profile(name, b"GRAY", b"XYZ ", {b"kTRC": _curve(curve)})


def constant_cmyk_profile(name: str, lab: tuple[float, float, float]) -> bytes:
    """Return a CMYK profile in which every ink gives the same colour, so that its use is plain to see."""
    inputs, outputs, grid = 4, 3, 2
    identity = b"".join(round(v * 257).to_bytes(2, "big") for v in (0, 255))
    lightness, a, b = lab
    # The 16-bit Lab of version 2: 0xFF00 is L = 100, 0x8000 is a = 0.
    node = struct.pack(">3H", round(lightness / 100 * 0xFF00), round((a + 128) * 256), round((b + 128) * 256))
    table = b"mft2\0\0\0\0" + bytes([inputs, outputs, grid, 0])
    table += b"".join(struct.pack(">i", 65536 * (i % 4 == 0)) for i in range(9))
    table += struct.pack(">2H", 2, 2) + identity * inputs + node * grid**inputs + identity * outputs
    return _profile(name, b"CMYK", b"Lab ", {b"A2B0": table, b"A2B1": table}, kind=b"prtr")


def in_srgb(pixels: np.ndarray, colorants: Sequence[Sequence[float]], curve: Curve) -> np.ndarray:
    """Convert uint8 (..., 3) of a matrix profile to uint8 sRGB, in float64."""
    to_srgb = np.linalg.solve(np.array(SRGB).T, np.array(colorants).T)
    linear = np.clip(curve(pixels / 255) @ to_srgb.T, 0, 1)
    return np.rint(255 * linear_to_srgb(linear)).astype(np.uint8)


def _profile(
    name: str, space: bytes, connection: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr"
) -> bytes:
    text = name.encode() + b"\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + b"\0" * 78,
        b"wtpt": _xyz(_D50),
        b"cprt": b"text\0\0\0\0none\0",
        **tags,
    }
    entries, data, start = b"", b"", 128 + 4 + 12 * len(tags)
    for key, value in tags.items():
        entries += key + struct.pack(">2I", start + len(data), len(value))
        data += value + b"\0" * (-len(value) % 4)
    illuminant = b"".join(struct.pack(">i", round(v * 65536)) for v in _D50)
    header = struct.pack(">I4xI4s4s4s", start + len(data), 0x02400000, kind, space, connection)
    header += struct.pack(">6H", 2025, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28 + illuminant
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + entries + data


def _xyz(values: Sequence[float]) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(v * 65536)) for v in values)


def _curve(curve: Curve) -> bytes:
    samples = np.rint(65535 * curve(np.linspace(0, 1, 4096))).astype(">u2")
    return b"curv\0\0\0\0" + struct.pack(">I", len(samples)) + samples.tobytes()

"""How many values a msgpack frame holds, before any exists: an empty list takes seventy times its byte when decoded."""

from __future__ import annotations

_FIXED = {
    **dict.fromkeys((0xCC, 0xD0), 1),
    **dict.fromkeys((0xCD, 0xD1, 0xD4, 0xDC, 0xDE), 2),
    **dict.fromkeys((0xCA, 0xCE, 0xD2, 0xDD, 0xDF), 4),
    **dict.fromkeys((0xCB, 0xCF, 0xD3), 8),
    **{0xD5: 3, 0xD6: 5, 0xD7: 9, 0xD8: 17},  # extensions: their type and 2, 4, 8, 16 bytes
    **{0xA0 + length: length for length in range(32)},
}
_SKIP = [_FIXED.get(first, 0) for first in range(256)]  # bytes that belong to the value, after its first
_WIDTHS = {
    0xC4: 1,
    0xC5: 2,
    0xC6: 4,
    0xC7: 1,
    0xC8: 2,
    0xC9: 4,
    0xD9: 1,
    0xDA: 2,
    0xDB: 4,
}  # of the length that follows


def count_values(frame: bytes, most: int) -> int:
    """Values in `frame`, those inside lists and maps included; stops one past `most`. Never raises: what is no msgpack,
    the decoder will refuse."""
    position, end, count = 0, len(frame), 0
    while position < end and count <= most:
        first = frame[position]
        position += 1 + _SKIP[first]
        if width := _WIDTHS.get(first):
            position += width + int.from_bytes(frame[position : position + width], "big") + (0xC7 <= first <= 0xC9)
        count += 1
    return count

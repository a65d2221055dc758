"""Fingerprints of data."""

import hashlib

DIGITS = 16
"""Hexadecimal digits, 4 bits each: enough to distinguish datasets."""


def digest(*parts: object) -> str:
    """Fingerprint of `parts`: bytes as they are, anything else as it is written."""
    total = hashlib.sha256()
    for part in parts:
        content = part if isinstance(part, bytes) else str(part).encode()
        total.update(len(content).to_bytes(8) + content)
    return total.hexdigest()[:DIGITS]

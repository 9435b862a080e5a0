"""Takes secrets out of what a run tells and writes: tokens of the hub, passwords in addresses."""

from __future__ import annotations

import os
import re

VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
SHORTEST = 8  # a shorter value is a dummy, and may be part of any word
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}")
PASSWORD = re.compile(r"(?<=://)[^/\s:@]*:[^/\s@]+(?=@)")


def redact(text: str) -> str:
    """The text with every secret replaced by `***`.

    Args:
        text: a log line, a file's content.

    Returns:
        The same without the values of `HF_TOKEN`, anything of a hub token's form, and
        `user:password` of addresses.
    """
    for name in VARIABLES:
        value = os.environ.get(name, "")
        if len(value) >= SHORTEST:
            text = text.replace(value, "***")
    return PASSWORD.sub("***", TOKEN.sub("hf_***", text))

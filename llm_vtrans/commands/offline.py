"""--offline: nothing leaves the machine, whatever library would like to connect."""

from __future__ import annotations

import ipaddress
import os
import sys
from typing import Any

from llm_vtrans.errors import UserError

SWITCHES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
MODULES = ("huggingface_hub.constants", "datasets.config")  # they read the switches when imported


def forbid_network() -> None:
    """Turns the libraries' offline modes on and refuses every connection, for the whole process.

    Ranks still reach each other: `torch.distributed` does not connect through Python.
    """
    os.environ.update(dict.fromkeys(SWITCHES, "1"))
    for name in MODULES:
        for switch in SWITCHES:
            if hasattr(sys.modules.get(name), switch):
                setattr(sys.modules[name], switch, True)
    sys.addaudithook(_refuse)


def _refuse(event: str, args: tuple[Any, ...]) -> None:
    if event == "socket.getaddrinfo":
        host = args[0]
    elif event in ("socket.connect", "socket.sendto") and isinstance(args[1], tuple):
        host = args[1][0]
    else:
        return
    if not _is_here(host):
        raise UserError(
            f"--offline: {_text(host)} would be connected to; fetch model and data before, or "
            "leave --offline out"
        )


def _text(host: str | bytes) -> str:
    return host.decode(errors="replace") if isinstance(host, bytes) else str(host)


def _is_here(host: str | bytes | None) -> bool:
    """Whether a host is this machine."""
    if host is None or _text(host) in ("", "localhost"):
        return True
    try:
        return ipaddress.ip_address(_text(host).partition("%")[0]).is_loopback
    except ValueError:
        return False

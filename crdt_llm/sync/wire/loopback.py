"""Which host names mean this machine. It knows names and addresses, and never looks one up."""

from __future__ import annotations

from ipaddress import ip_address


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, as far as its name says.

    Args:
        host: a name or an address, without port or brackets.
    """
    if host == "localhost" or host.endswith(".localhost"):  # RFC 6761, 6.3
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:  # a name
        return False

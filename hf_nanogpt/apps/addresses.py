"""Where a server listens, and which browsers and clients may reach it."""

import socket
from ipaddress import ip_address

from ..errors import UserError


def open_socket(host: str, port: int, *, family: int = socket.AF_UNSPEC) -> socket.socket:
    """Listen on an address; port 0 means any free one.

    Raises:
        UserError: that is impossible, for example because another program listens there.
    """
    if not 0 <= port < 2**16:
        raise UserError(f"port={port} is invalid: it must be 1 to 65535, or 0 for any free one.")
    try:
        found = socket.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM)
        family, *_, address = found[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(
            f"Cannot listen on host={host} port={port} ({why}): choose another --host or --port."
        ) from error


def list_hosts(host: str, address: str) -> list[str]:
    """Return the values of the header `Host` to accept: this machine's names, or all (`*`).

    A web page could let its own name point to this machine and then call the server from the
    browser (DNS rebinding). A server that only this machine reaches refuses such names.
    """
    if not ip_address(address.partition("%")[0]).is_loopback:
        return ["*"]
    return ["localhost", "127.0.0.1", "[::1]", f"[{address}]" if ":" in address else address, host]


def check_key_is_there(host: str, address: str, api_key: str | None) -> None:
    """Raise a `UserError` if other machines can reach the server and no key is required."""
    if "*" in list_hosts(host, address) and not api_key:
        raise UserError(
            f"host={host} lets other machines connect, so clients need a key: give --api_key, set "
            "HF_NANOGPT_API_KEY, or leave out --host to serve this machine only."
        )

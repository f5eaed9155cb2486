"""One http(s) GET with every bound enforced: bytes, total seconds, redirects, and which hosts may be reached."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable
from urllib.parse import quote, urljoin, urlsplit

from vtengine.vision.errors import ImageCode, ImageError

MAX_REDIRECTS = 3
PAUSES_S = (0.5, 2.0)
"""Before a second and a third try, where what went wrong may be over by then."""
_LATER = frozenset((408, 425, 429))  # statuses below 500 that say: try again
_AS_IT_IS = "/?%:@!$&'()*+,;=[]|~"  # in an address; blanks and letters beyond ASCII are escaped, as browsers do
_CHUNK = 1 << 16
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: the last 32 bits are the address of IPv4 that is reached
_INWARD = tuple(map(ipaddress.IPv6Network, ("::/96", "64:ff9b:1::/48", "2002::/16", "fec0::/10")))
"""Global to Python, but they may lead to an address of IPv4 that is not (RFC 4291, 8215, 3056), or to a site's own."""


def fetch(url: str, max_bytes: int, timeout_s: float, allow_private_hosts: bool) -> bytes:
    """The body of the answer to `url`; timeout_s: of all tries together. Proxies of the environment are not used, so
    that the host check holds. Raises ImageError: image_unreachable where a network or a server failed for now.
    """
    deadline = time.monotonic() + timeout_s
    for pause_s in PAUSES_S:
        try:
            return _follow(url, max_bytes, deadline, allow_private_hosts)
        except ImageError as fault:
            if fault.code != "image_unreachable" or time.monotonic() + pause_s >= deadline:
                raise
            time.sleep(pause_s)
    return _follow(url, max_bytes, deadline, allow_private_hosts)


def _follow(url: str, max_bytes: int, deadline: float, allow_private_hosts: bool) -> bytes:
    """One try, through all redirects."""
    for _ in range(MAX_REDIRECTS + 1):
        status, location, body = _get(url, max_bytes, deadline, allow_private_hosts)
        if status == 200:
            return body
        if status not in (301, 302, 303, 307, 308) or not location:
            passing = status >= 500 or status in _LATER
            code: ImageCode = "image_unreachable" if passing else "image_not_found"
            raise ImageError(code, f"image {url!r}: the server answered with status {status}")
        url = urljoin(url, location)
    raise ImageError("image_not_found", f"image {url!r}: more than {MAX_REDIRECTS} redirects")


def _get(url: str, max_bytes: int, deadline: float, allow_private: bool) -> tuple[int, str, bytes]:
    connection = _connection(url, deadline, allow_private)
    try:
        connection.connect()
        # The socket's own time-out restarts with each byte received; this one does not.
        guard = threading.Timer(max(0.0, deadline - time.monotonic()), _cut, (connection.sock,))
        guard.daemon = True
        guard.start()
        try:
            answer = _exchange(connection, url, max_bytes)
        finally:
            guard.cancel()
        if time.monotonic() >= deadline:  # the guard's cut looks like the end of a body without a stated length
            raise TimeoutError
        return answer
    except UnicodeError as fault:
        raise ImageError("image_not_found", f"image {url!r}: its host is no name of one: {fault}") from fault
    except (OSError, http.client.HTTPException) as fault:
        late = time.monotonic() >= deadline
        reason = "timed out" if late else str(fault) or type(fault).__name__
        raise ImageError("image_unreachable", f"image {url!r} cannot be fetched: {reason}") from fault
    finally:
        connection.close()


def _exchange(connection: http.client.HTTPConnection, url: str, max_bytes: int) -> tuple[int, str, bytes]:
    parts = urlsplit(url)
    target = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), safe=_AS_IT_IS)
    connection.request("GET", target, headers={"Accept": "image/*", "User-Agent": "vtengine"})
    answer = connection.getresponse()
    if answer.status != 200:
        location = answer.getheader("Location", "")  # http.client reads bytes as Latin-1, many servers write UTF-8
        return answer.status, location.encode("latin-1").decode("utf-8", "replace"), b""
    stated = answer.length  # None for a chunked body
    body = bytearray()
    while len(body) <= max_bytes and (stated is None or stated <= max_bytes):
        chunk = answer.read(_CHUNK)
        if not chunk:
            if stated is not None and len(body) < stated:
                raise OSError(f"{len(body)} of {stated} bytes received")
            return 200, "", bytes(body)
        body += chunk
    raise ImageError("image_too_large_bytes", f"image {url!r} has more than {max_bytes} bytes, the most accepted")


def _connection(url: str, deadline: float, allow_private: bool) -> http.client.HTTPConnection:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as fault:
        raise ImageError("image_url_not_allowed", f"image {url!r}: {fault}") from fault
    if parts.scheme not in ("http", "https") or not host or parts.username is not None:
        raise ImageError("image_url_not_allowed", f"image {url!r}: must be http(s)://host/..., without a user name")
    left = max(0.001, deadline - time.monotonic())
    connection: http.client.HTTPConnection
    try:
        if parts.scheme == "https":
            connection = http.client.HTTPSConnection(host, port, timeout=left, context=ssl.create_default_context())
        else:
            connection = http.client.HTTPConnection(host, port, timeout=left)
    except http.client.InvalidURL as fault:
        raise ImageError("image_url_not_allowed", f"image {url!r}: {fault}") from fault
    if not allow_private:
        # http.client's one hook for the socket: the address that was checked is the address connected to.
        setattr(connection, "_create_connection", _public_only(url))  # noqa: B010
    return connection


def _public_only(url: str) -> Callable[..., socket.socket]:
    def connect(address: tuple[str, int], timeout: float, source_address: None = None) -> socket.socket:
        found = dict.fromkeys(str(entry[4][0]) for entry in socket.getaddrinfo(*address, type=socket.SOCK_STREAM))
        fault: OSError | None = None
        for ip in found:
            if not _is_public(ip):
                where = f"its host {ip} is on a private network; those only with --allow-private-hosts"
                raise ImageError("image_url_not_allowed", f"image {url!r}: {where}")
        for ip in found:
            try:
                return socket.create_connection((ip, address[1]), timeout, source_address)
            except OSError as unreachable:
                fault = unreachable
        raise fault or OSError("the host has no address")

    return connect


def _is_public(ip: str) -> bool:
    known = ipaddress.ip_address(ip.partition("%")[0])
    known = getattr(known, "ipv4_mapped", None) or known
    if known in _NAT64:
        known = ipaddress.IPv4Address(int(known) & 0xFFFFFFFF)
    return known.is_global and not known.is_multicast and not any(known in network for network in _INWARD)


def _cut(sock: socket.socket | None) -> None:
    if sock is not None:
        try:
            sock.shutdown(socket.SHUT_RDWR)
        except OSError:  # closed meanwhile
            return

"""Sources: confined paths, data: URLs, http(s) behind two switches."""

from __future__ import annotations

import base64
import errno
import os
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

from vtengine.vision import http_source
from vtengine.vision.errors import ImageError
from vtengine.vision.source import SourceLimits, read_image_source

LOCAL = SourceLimits(max_bytes=1000, allow_http=True, allow_private_hosts=True, timeout_s=2.0)


def code_of(source: str, root: Path, limits: SourceLimits | None = None) -> str:
    with pytest.raises(ImageError) as caught:
        read_image_source(source, root, limits)
    return caught.value.code


@pytest.fixture
def root(tmp_path: Path) -> Path:
    inside = tmp_path / "root"
    (inside / "sub").mkdir(parents=True)
    (inside / "a.png").write_bytes(b"A")
    (inside / "sub" / "b.png").write_bytes(b"B")
    (inside / "empty.png").touch()
    (tmp_path / "secret.png").write_bytes(b"S")
    (tmp_path / "root2").mkdir()
    (tmp_path / "root2" / "c.png").write_bytes(b"C")
    return inside


# Paths


def test_paths_inside_the_root(root: Path) -> None:
    assert read_image_source("a.png", root) == b"A"
    assert read_image_source("sub/../sub/./b.png", root) == b"B"
    assert read_image_source(str(root / "a.png"), root) == b"A"
    (root / "odd:name,100%.png").write_bytes(b"O")
    assert read_image_source("odd:name,100%.png", root) == b"O"
    (root / "link.png").symlink_to("sub/b.png")
    assert read_image_source("link.png", root) == b"B"


def test_a_root_that_is_relative_or_a_symlink(root: Path, monkeypatch) -> None:
    monkeypatch.chdir(root.parent)
    assert read_image_source("a.png", Path("root")) == b"A"
    Path("alias").symlink_to("root")
    assert read_image_source("a.png", Path("alias")) == b"A"
    assert read_image_source(str(root / "a.png"), Path("alias")) == b"A"
    assert read_image_source(str(root / "a.png")[1:], Path("/")) == b"A"


@pytest.mark.parametrize(
    "source", ["../secret.png", "sub/../../secret.png", "/etc/passwd", "../missing", "../root2/c.png"]
)
def test_paths_out_of_the_root(root: Path, source: str) -> None:
    assert code_of(source, root) == "image_outside_root"


def test_symlinks_out_of_the_root(root: Path) -> None:
    (root / "file.png").symlink_to(root.parent / "secret.png")
    (root / "folder").symlink_to(root.parent)
    (root / "chain.png").symlink_to("file.png")
    for source in ("file.png", "folder/secret.png", "chain.png", "folder/missing.png"):
        assert code_of(source, root) == "image_outside_root"


def test_paths_that_are_no_file(root: Path) -> None:
    (root / "loop").symlink_to("loop")
    os.mkfifo(root / "pipe")
    for source in ("missing.png", "", "nul\0.png", "loop", "pipe", "a.png/x", "x" * 5000, "a.png\n"):
        assert code_of(source, root) == "image_not_found", source
    for source in (".", "sub", "sub/"):
        assert code_of(source, root) == "image_is_directory", source
    assert code_of("empty.png", root) == "image_empty"


def test_a_missing_file_is_said_to_be_missed_where_it_was_looked_for(root: Path) -> None:
    with pytest.raises(
        ImageError, match=re.escape(f"image 'sub/no.png': No such file or directory (relative to '{root}")
    ):
        read_image_source("sub/no.png", root)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission(root: Path) -> None:
    (root / "a.png").chmod(0)
    assert code_of("a.png", root) == "image_not_found"


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.EIO, "image_unreachable"), (errno.EMFILE, "image_unreachable"), (errno.EACCES, "image_not_found")],
)
def test_a_disk_that_fails_is_no_missing_file(
    root: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: str
) -> None:
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("vtengine.vision.source.os.open", fail)
    assert code_of("a.png", root) == code


def test_byte_limit_of_a_file(root: Path) -> None:
    (root / "big.png").write_bytes(bytes(11))
    assert code_of("big.png", root, SourceLimits(max_bytes=10)) == "image_too_large_bytes"
    assert len(read_image_source("big.png", root, SourceLimits(max_bytes=11))) == 11


# data: URLs


def test_data_url(tmp_path: Path) -> None:
    body = base64.b64encode(bytes(range(256))).decode()
    assert read_image_source(f"data:image/png;base64,{body}", tmp_path) == bytes(range(256))
    assert read_image_source(f"DATA:image/jpeg;charset=utf-8;BASE64,{body}", tmp_path) == bytes(range(256))


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("data:image/png;base64", "image_corrupt"),
        ("data:image/png,AAAA", "image_corrupt"),
        ("data:image/png;base64,", "image_empty"),
        ("data:image/png;base64,AAA", "image_corrupt"),
        ("data:image/png;base64,AA AA", "image_corrupt"),
        ("data:image/png;base64,AAAA\n", "image_corrupt"),
        ("data:image/png;base64,AA==AA==", "image_corrupt"),
        ("data:image/png;base64,-_-_", "image_corrupt"),
        ("data:image/png;base64,A\u00e9AA", "image_corrupt"),
        ("data:text/html;base64,AAAA", "image_unsupported_format"),
        ("data:;base64,AAAA", "image_unsupported_format"),
        ("data:image/png;base64," + "A" * 1600, "image_too_large_bytes"),
        ("data:image/png;base64," + "!" * 1600, "image_too_large_bytes"),
    ],
)
def test_bad_data_urls(tmp_path: Path, source: str, code: str) -> None:
    assert code_of(source, tmp_path, SourceLimits(max_bytes=1000)) == code


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4])
def test_byte_limit_of_a_data_url_is_exact(tmp_path: Path, size: int) -> None:
    source = "data:image/png;base64," + base64.b64encode(bytes(4)).decode()
    if size and size < 4:
        assert code_of(source, tmp_path, SourceLimits(max_bytes=size)) == "image_too_large_bytes"
    elif size:
        assert read_image_source(source, tmp_path, SourceLimits(max_bytes=size)) == bytes(4)


def test_messages_do_not_repeat_the_image(tmp_path: Path) -> None:
    with pytest.raises(ImageError) as caught:
        read_image_source("data:image/png;base64," + "!" * 10_000, tmp_path)
    assert len(str(caught.value)) < 300


# URLs


@pytest.mark.parametrize(
    "source", ["http://127.0.0.1/a.png", "https://localhost/a.png", "file:///etc/passwd", "ftp://x/y"]
)
def test_urls_are_off_by_default(root: Path, source: str) -> None:
    assert code_of(source, root) == "image_url_not_allowed"


@pytest.mark.parametrize(
    "source", ["file:///etc/passwd", "FTP://x/y", "gopher://x/y", "http://", "http://u:p@127.0.0.1/", "http://h:x/"]
)
def test_other_urls_stay_off(root: Path, source: str) -> None:
    assert code_of(source, root, LOCAL) == "image_url_not_allowed"


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "10.0.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]"],
)
def test_private_hosts_need_their_own_switch(root: Path, host: str) -> None:
    public = SourceLimits(allow_http=True, timeout_s=2.0)
    assert code_of(f"http://{host}:9/a.png", root, public) == "image_url_not_allowed"


@pytest.mark.parametrize(
    ("ip", "is_public"),
    [
        ("93.184.215.14", True),
        ("2606:4700::1111", True),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::808:808", True),  # as a network that has IPv6 alone sees 8.8.8.8
        ("64:ff9b::a9fe:a9fe", False),
        ("64:ff9b:1::a00:1", False),
        ("2002:7f00:1::1", False),
        ("::7f00:1", False),
        ("fec0::1", False),
        ("fe80::1%eth0", False),
        ("ff0e::1", False),
    ],
)
def test_an_address_of_ipv6_that_holds_one_of_ipv4_is_no_way_around(ip: str, is_public: bool) -> None:
    assert http_source._is_public(ip) is is_public


class Answers(BaseHTTPRequestHandler):
    """A server with every habit that matters here."""

    protocol_version = "HTTP/1.1"
    fails_left = 0

    def do_GET(self) -> None:
        getattr(self, "serve_" + self.path.strip("/").partition("?")[0])()

    def serve_good(self) -> None:
        self._answer(200, b"image", [("Content-Length", "5")])

    def serve_missing(self) -> None:
        self._answer(404, b"", [("Content-Length", "0")])

    def serve_echo(self) -> None:
        self._answer(200, self.path.encode("ascii"), [("Content-Length", str(len(self.path)))])

    def serve_busy(self) -> None:
        self._answer(429, b"", [("Content-Length", "0")])

    def serve_broken(self) -> None:
        self._answer(503, b"", [("Content-Length", "0")])

    def serve_recovers(self) -> None:
        if Answers.fails_left:
            Answers.fails_left -= 1
            self.serve_broken()
        else:
            self.serve_good()

    def serve_moved(self) -> None:
        self._answer(302, b"", [("Location", "/good?x=1"), ("Content-Length", "0")])

    def serve_moved_far(self) -> None:
        self.wfile.write("HTTP/1.1 302 Found\r\nLocation: /echo?B\u00e4r\r\nContent-Length: 0\r\n\r\n".encode())

    def serve_circle(self) -> None:
        self._answer(302, b"", [("Location", "/circle"), ("Content-Length", "0")])

    def serve_to_file(self) -> None:
        self._answer(302, b"", [("Location", "file:///etc/passwd"), ("Content-Length", "0")])

    def serve_stated_large(self) -> None:
        self._answer(200, b"", [("Content-Length", "100000000")])

    def serve_endless(self) -> None:
        self._answer(200, b"x" * 5000, [("Connection", "close")])

    def serve_cut(self) -> None:
        self._answer(200, b"half", [("Content-Length", "8"), ("Connection", "close")])
        self.close_connection = True

    def serve_empty(self) -> None:
        self._answer(200, b"", [("Content-Length", "0")])

    def serve_drip(self) -> None:
        self._answer(200, b"", [("Connection", "close")])
        for _ in range(400):
            try:
                self.wfile.write(b"x")
                self.wfile.flush()
            except OSError:
                break
            time.sleep(0.05)

    def serve_silent(self) -> None:
        time.sleep(20)

    def _answer(self, status: int, body: bytes, headers: list[tuple[str, str]]) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
            self.close_connection |= name == "Connection"
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_http_where_allowed(server: str, root: Path) -> None:
    assert read_image_source(f"{server}/good", root, LOCAL) == b"image"
    assert read_image_source(f"{server}/moved", root, LOCAL) == b"image"
    assert read_image_source(f"{server}/moved_far", root, LOCAL) == b"/echo?B%C3%A4r"


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("missing", "image_not_found"),
        ("circle", "image_not_found"),
        ("to_file", "image_url_not_allowed"),
        ("stated_large", "image_too_large_bytes"),
        ("endless", "image_too_large_bytes"),
        ("cut", "image_unreachable"),
        ("busy", "image_unreachable"),
        ("broken", "image_unreachable"),
        ("empty", "image_empty"),
    ],
)
def test_http_faults(server: str, root: Path, path: str, code: str) -> None:
    assert code_of(f"{server}/{path}", root, LOCAL) == code


@pytest.mark.parametrize("path", ["drip", "silent"])
def test_http_time_limit_is_of_the_whole_fetch(server: str, root: Path, path: str) -> None:
    limits = SourceLimits(allow_http=True, allow_private_hosts=True, timeout_s=0.3)
    started = time.monotonic()
    with pytest.raises(ImageError, match="timed out") as caught:
        read_image_source(f"{server}/{path}", root, limits)
    assert caught.value.code == "image_unreachable"
    assert time.monotonic() - started < 10  # either answer takes 20 s


def test_http_of_a_closed_port(root: Path) -> None:
    assert code_of("http://127.0.0.1:1/a.png", root, LOCAL) == "image_unreachable"


def test_http_addresses_are_escaped_where_they_must_be(server: str, root: Path) -> None:
    for path in ("echo?/B\u00e4r 1%20a.png", "echo?q=[a|b]&x=%2F"):
        escaped = read_image_source(f"{server}/{path}", root, LOCAL).decode("ascii")
        assert unquote(escaped) == "/" + unquote(path) and " " not in escaped and "%25" not in escaped


def test_http_of_a_host_that_is_no_name(root: Path) -> None:
    assert code_of(f"http://{'a' * 70}.example/a.png", root, LOCAL) == "image_not_found"
    assert code_of("http://a b/a.png", root, LOCAL) == "image_url_not_allowed"


def test_http_that_fails_for_a_while_is_asked_again(server: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_source, "PAUSES_S", (0.01, 0.02))
    Answers.fails_left = 2
    assert read_image_source(f"{server}/recovers", root, LOCAL) == b"image"
    Answers.fails_left = 4
    assert code_of(f"{server}/recovers", root, LOCAL) == "image_unreachable"
    assert Answers.fails_left == 1, "three tries, no more"


@pytest.mark.parametrize(("options", "named"), [({"max_bytes": 0}, "max_bytes"), ({"timeout_s": 0.0}, "timeout_s")])
def test_limits_that_mean_nothing_are_refused(options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=f"source.{named}"):
        SourceLimits(**options)

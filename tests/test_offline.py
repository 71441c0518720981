"""What no test may do, and how a missing server is told."""

from __future__ import annotations

import socket

import pytest
from pytest_socket import SocketConnectBlockedError

from tests.conftest import require_server


def test_nothing_but_this_machine_can_be_reached() -> None:
    # pytest-socket warns before it refuses, and here a warning is an error.
    with socket.socket() as outside, pytest.raises((SocketConnectBlockedError, UserWarning), match=r"192\.0\.2\.1"):
        outside.connect(("192.0.2.1", 443))


def test_a_missing_server_is_a_skip_at_home_and_a_failure_where_it_was_promised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TWINLOOK_REQUIRE_SERVERS", raising=False)
    with pytest.raises(pytest.skip.Exception, match="a server"):
        require_server(False, "needs a server")
    monkeypatch.setenv("TWINLOOK_REQUIRE_SERVERS", "1")
    with pytest.raises(pytest.fail.Exception, match="a server"):
        require_server(False, "needs a server")
    require_server(True, "")

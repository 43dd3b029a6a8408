"""A real SFTP server (asyncssh) on loopback, in a thread of this process.

What belongs here: starting and stopping it, and an fsspec client of it. It serves files and, as
many do, refuses to run commands.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
from pathlib import Path
from typing import Any

import asyncssh
import fsspec

HOST = "127.0.0.1"


class SftpServer:
    """Serves a directory as its root.

    Example:
        >>> with SftpServer(tmp_path) as server:  # doctest: +SKIP
        ...     server.client().pipe_file("/a", b"1")
    """

    user = "tune"

    def __init__(self, directory: Path) -> None:
        self.served = directory
        self._password = secrets.token_hex(8)
        self._loop = asyncio.new_event_loop()
        self._server: Any = None
        self._connections: list[Any] = []

    def __enter__(self) -> SftpServer:
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._run(self._start())
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.close()
        self._run(self._server.wait_closed())
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _run(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    async def _start(self) -> None:
        password = self._password

        connections = self._connections

        class Login(asyncssh.SSHServer):
            def connection_made(self, conn: Any) -> None:
                connections.append(conn)

            def password_auth_supported(self) -> bool:
                return True

            def validate_password(self, username: str, given: str) -> bool:
                return given == password

        def files(channel: Any) -> asyncssh.SFTPServer:
            return asyncssh.SFTPServer(channel, chroot=str(self.served).encode())

        key = asyncssh.generate_private_key("ssh-ed25519")
        self._server = await asyncssh.create_server(
            Login, HOST, 0, server_host_keys=[key], sftp_factory=files
        )

    @property
    def port(self) -> int:
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def url(self, path: str) -> str:
        """What a user gives as ``upload_dir``."""
        return f"sftp://{self.user}@{HOST}:{self.port}/{path}"

    def options(self) -> dict[str, Any]:
        """And as ``storage_options``."""
        return {"password": self._password}

    def disconnect(self) -> None:
        """Break all connections, as a restart would."""
        for connection in self._connections:
            self._loop.call_soon_threadsafe(connection.abort)
        self._connections.clear()

    def client(self) -> Any:
        """A new fsspec file system."""
        return fsspec.filesystem(
            "ssh",
            host=HOST,
            port=self.port,
            username=self.user,
            password=self._password,
            known_hosts=None,
            skip_instance_cache=True,
        )

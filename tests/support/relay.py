"""A network between a process and a store that can be cut, on one machine and without root."""

from __future__ import annotations

import contextlib
import socket
import threading


class Relay:
    """A connection to a port that can be cut without a word."""

    def __init__(self, port):
        self._port, self._sockets, self._open = port, [socket.create_server(("127.0.0.1", 0))], threading.Event()
        self.port = self._sockets[0].getsockname()[1]
        self._open.set()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self):
        self._open.clear()

    def close(self):
        """Now with a word: nobody waits any longer."""
        self._open.set()
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                pair = self._sockets[0].accept()[0], socket.create_connection(("127.0.0.1", self._port))
                self._sockets.extend(pair)
                for source, target in (pair, pair[::-1]):
                    threading.Thread(target=self._pump, args=(source, target), daemon=True).start()

    def _pump(self, source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self._open.wait()
                target.sendall(data)

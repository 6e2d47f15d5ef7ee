"""Frames of HTTP/2 by hand, for connections that no gRPC client would make (RFC 9113; header blocks: RFC 7541)."""

import select
import socket
import struct
import time

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS = 1, 4
CANCEL = struct.pack(">I", 8)
NO_WINDOW = struct.pack(">HI", 4, 0)  # of SETTINGS: nothing may be sent to the client's streams
MORE_WINDOW = struct.pack(">I", 2**30)  # of WINDOW_UPDATE


def frame(kind, flags, stream, payload=b""):
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def _text(value):
    return bytes((len(value),)) + value  # as it is, without Huffman's code; below 127 bytes


def headers(path):
    """A call of gRPC: literals without indexing, names from the static table but for `te`."""
    literals = b"\x04" + _text(path.encode()) + b"\x01" + _text(b"localhost") + b"\x0f\x10" + _text(b"application/grpc")
    return b"\x83\x86" + literals + b"\x00" + _text(b"te") + _text(b"trailers")  # POST, http


def message(payload):
    """What a DATA frame of gRPC has of a message."""
    return b"\0" + struct.pack(">I", len(payload)) + payload


def connect(target, settings=b"", source="127.0.0.1"):
    """A connection from this address of the machine whose preface and settings are sent."""
    host, _, port = target.rpartition(":")
    connection = socket.create_connection((host, int(port)), 60.0, (source, 0))
    connection.sendall(PREFACE + frame(SETTINGS, 0, 0, settings))
    return connection


def send(connection, data):
    """Whether the server took it; what it says meanwhile is thrown away."""
    try:
        while select.select([connection], [], [], 0)[0] and connection.recv(65536):
            pass
        connection.sendall(data)
    except OSError:  # it has closed the connection
        return False
    return True


def received(connection, seconds):
    """Kinds of the frames that come within so long, or until the server closes the connection."""
    data, ends = b"", time.monotonic() + seconds
    while select.select([connection], [], [], max(0.0, ends - time.monotonic()))[0]:
        part = connection.recv(65536)
        if not part:
            break
        data += part
    kinds = []
    while data:
        kinds.append(data[3])
        data = data[9 + int.from_bytes(data[:3], "big") :]
    return kinds

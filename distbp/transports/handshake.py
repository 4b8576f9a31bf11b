"""How two processes of one run prove to each other that they know the run key: the rules, without any I/O.

The listening side speaks first.  K is the run key, n and m are fresh random numbers of 32 bytes:

    listening  -> connecting   magic, version, n
    connecting -> listening    magic, version, m, length of hello, hello, proof of "connecting"
    listening  -> connecting   accepted or refused, proof of "listening"

    proof of D = HMAC-SHA256(K; D, version, n, m, hello)

Proofs are compared in constant time.  A recorded handshake is worth nothing, because n and m are
new each time; a proof cannot be sent back to whoever made it, because it names its direction; hello cannot be
changed on the way, because both proofs cover it.  All that is read before the first proof has been checked is
a fixed header and at most `MOST_HELLO_BYTES`, which are parsed only afterwards.

What it does not do: encrypt, or protect what is sent afterwards.  Whoever can change packets between two
hosts can let them shake hands and then change what they say; whoever can read packets reads everything but
the key.  Use a network that you trust, or a tunnel.

Each side is an object that wants to read exactly `needs` bytes, answers them in `take`, and is `finished` in
the end; `first_words` are sent before anything is read.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
from collections.abc import Mapping
from typing import Any

import msgspec

from distbp.errors import AuthenticationError, EnvironmentMismatch, TransportError

__all__ = [
    "KEY_BYTES",
    "MOST_HELLO_BYTES",
    "VERSION",
    "Connecting",
    "Listening",
    "Refused",
    "decode_json",
    "keyed",
]

VERSION = 1
"""Of everything that travels: the handshake, JSON messages, the frames of a transport."""

KEY_BYTES = 32
MOST_HELLO_BYTES = 4096
MOST_DEPTH = 16
"""Levels of lists and objects in JSON; the parser itself recurses, so there must be a limit."""

_MAGIC = b"distbp"
_NONCE_BYTES = 32
_PROOF_BYTES = hashlib.sha256().digest_size
_GREETING = struct.Struct("!6sH32s")
_OPENING = struct.Struct("!6sH32sH")
_VERDICT = struct.Struct(f"!B{_PROOF_BYTES}s")
_REFUSED, _ACCEPTED = 0, 1


class Refused(Exception):
    """The connecting side did not prove who it is; `answer` is sent before the connection is closed."""

    def __init__(self, reason: str, answer: bytes = b"") -> None:
        super().__init__(reason)
        self.answer = answer


def keyed(key: bytes) -> hmac.HMAC:
    """Return what proofs are made with, so that nobody need keep the key itself."""
    if len(key) != KEY_BYTES:
        raise AuthenticationError(
            f"expected a run key of {KEY_BYTES} bytes, got {len(key)}; let the launcher make it, or use "
            f"secrets.token_bytes({KEY_BYTES})"
        )
    return hmac.new(key, digestmod=hashlib.sha256)


def encode_hello(hello: Mapping[str, Any]) -> bytes:
    """Return `hello` as JSON; `ValueError` if it is too long or too deep."""
    data = msgspec.json.encode(dict(hello))
    if len(data) > MOST_HELLO_BYTES:
        raise ValueError(f"expected a hello of at most {MOST_HELLO_BYTES} bytes, got {len(data)}: shorten it")
    if not is_shallow(hello):
        raise ValueError(f"expected a hello that nests at most {MOST_DEPTH} deep, got a deeper one")
    return data


def decode_json(data: bytes | bytearray) -> dict[str, Any]:
    """Return a JSON object of at most `MOST_DEPTH` levels; `ValueError` for anything else."""
    try:
        value = msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise ValueError(f"no JSON object: {error}") from error
    if not is_shallow(value):
        raise ValueError(f"more than {MOST_DEPTH} levels")
    return value


def is_shallow(value: Any) -> bool:
    """Return whether a JSON object has at most `MOST_DEPTH` levels of lists and objects, itself included."""
    level = [value]
    for _ in range(MOST_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, Mapping) else outer)
            if isinstance(inner, Mapping | list | tuple)
        ]
        if not level:
            return True
    return False


class Listening:
    """The listening side of one handshake; `hello` is what the other side said, once it is `finished`."""

    def __init__(self, proof: hmac.HMAC) -> None:
        self._proof = proof
        self._mine = secrets.token_bytes(_NONCE_BYTES)
        self._theirs = b""
        self.first_words = _GREETING.pack(_MAGIC, VERSION, self._mine)
        self.needs = _OPENING.size
        self.finished = False
        self.hello: dict[str, Any] = {}

    def take(self, data: bytes) -> bytes:
        """Take exactly `needs` bytes and return the answer; raise `Refused`."""
        if not self._theirs:
            magic, version, self._theirs, length = _OPENING.unpack(data)
            if magic != _MAGIC:
                raise Refused(f"expected a handshake, got {data[:16]!r}")
            if version != VERSION:
                raise Refused(f"expected version {VERSION}, got {version!r}")
            if length > MOST_HELLO_BYTES:
                raise Refused(f"expected at most {MOST_HELLO_BYTES} bytes of hello, got {length!r}")
            self.needs = length + _PROOF_BYTES
            return b""
        hello, proof = data[:-_PROOF_BYTES], data[-_PROOF_BYTES:]
        said = (self._mine, self._theirs, hello)
        if not hmac.compare_digest(proof, _prove(self._proof, b"connecting", *said)):
            raise Refused("expected the run key, got another", _VERDICT.pack(_REFUSED, bytes(_PROOF_BYTES)))
        try:
            self.hello = decode_json(hello)
        except ValueError as error:
            raise Refused(f"expected a JSON object as hello, got {error}") from error
        self.finished = True
        return _VERDICT.pack(_ACCEPTED, _prove(self._proof, b"listening", *said))


class Connecting:
    """The connecting side of one handshake; `where` is what messages call the listener, as address:port."""

    first_words = b""

    def __init__(self, proof: hmac.HMAC, hello: bytes, where: str) -> None:
        self._proof = proof
        self._hello = hello
        self._where = where
        self._mine = secrets.token_bytes(_NONCE_BYTES)
        self._theirs = b""
        self.needs = _GREETING.size
        self.finished = False

    def take(self, data: bytes) -> bytes:
        """Take exactly `needs` bytes and return the answer; raise what `wire.connect` raises."""
        if not self._theirs:
            magic, version, self._theirs = _GREETING.unpack(data)
            self._check_kind(magic, version)
            proof = _prove(self._proof, b"connecting", self._theirs, self._mine, self._hello)
            self.needs = _VERDICT.size
            opening = _OPENING.pack(_MAGIC, VERSION, self._mine, len(self._hello))
            return opening + self._hello + proof
        verdict, proof = _VERDICT.unpack(data)
        if verdict != _ACCEPTED:
            raise AuthenticationError(
                f"expected {self._where} to know our run key, and it refused us: another job listens there, "
                "or the key file is not that of this job; give both sides the same key"
            )
        wanted = _prove(self._proof, b"listening", self._theirs, self._mine, self._hello)
        if not hmac.compare_digest(proof, wanted):
            raise AuthenticationError(
                f"expected {self._where} to prove that it knows our run key, and its proof is wrong: "
                "somebody else listens there; look who owns that port"
            )
        self.finished = True
        return b""

    def _check_kind(self, magic: bytes, version: int) -> None:
        """Raise unless the listener is a distbp of our version."""
        if magic != _MAGIC:
            raise TransportError(
                f"expected a process of distbp at {self._where}, got {magic!r} from it: another program "
                "listens there; look who owns that port, then run again: resuming is safe"
            )
        if version != VERSION:
            raise EnvironmentMismatch(
                f"expected protocol version {VERSION} at {self._where}, got {version!r}: the hosts have "
                "different releases of distbp; install the same one everywhere"
            )


def _prove(proof: hmac.HMAC, direction: bytes, listening: bytes, connecting: bytes, hello: bytes) -> bytes:
    """Return the proof of one side; all parts but the last have fixed lengths, so none can be shifted."""
    mac = proof.copy()
    mac.update(direction.ljust(16) + VERSION.to_bytes(2, "big") + listening + connecting + hello)
    return mac.digest()

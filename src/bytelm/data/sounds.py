"""Audio files as arrays of samples: PCM in WAV is read here, all else by soundfile, an optional package.

A program that writes into a pipe cannot go back to put the true size into the header. It leaves one that no file has,
or 0, and either means "to the end of the file" here.
"""

from __future__ import annotations

import io
import math
import re
import struct
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bytelm.data.files import shown
from bytelm.data.modalities.base import DamagedError, UnfitError
from bytelm.errors import MissingExtraError

_LONGEST = 1 << 28  # samples, of all channels together: 1 GiB while they are converted
_PIECE = 1 << 18  # samples per read of soundfile
_UNCOUNTED = 1 << 62  # frames, from which on libsndfile means that it does not know
# Bytes. ffmpeg, sox, espeak-ng and others leave FFFFFFFF, 7FFFFFFF, 7FFFF000 or 2000000000, sometimes with the size of
# the header added or taken off; files are read up to 1 GiB only, so that no true size is that large.
_ENDLESS = 2_000_000_000
_CHUNKS = 10_000  # most chunks in a WAV file before its samples
_LEAST = {"fmt ": 16, "ds64": 16}  # bytes of what is read of these chunks

_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE  # format tags of WAV
_GUID = bytes.fromhex("000000001000800000aa00389b71")  # follows a format tag where it is written as a GUID
_RIFFS = (b"RIFF", b"RIFX", b"RF64")
# Signatures of the audio files that are passed to soundfile. Of others it would have to guess.
_MARKS = (*_RIFFS, b"riff", b"fLaC", b"OggS", b"FORM", b".snd", b"caff", b"NIST_1A\n", b"ID3")
_SPHERE = (b"sample_count", b"channel_count", b"sample_n_bytes")


def samples_in(name: str, data: bytes) -> tuple[int, NDArray[np.float32]]:
    """Frames a second, and the samples `[frames, channels]` in [-1, 1), of which a float file may go beyond.

    Raises UnfitError for what is no sound file, DamagedError for one that ends too early, contradicts itself or is too
    long, MissingExtraError where soundfile is needed and missing.
    """
    if not data.startswith(_MARKS) and not _is_mpeg(data):
        raise UnfitError("not an audio file")
    if data.startswith(_RIFFS):
        wave = _Wave.of(data)
        if not wave.size:
            return wave.rate, np.zeros((0, wave.channels), np.float32)
        if wave.tag == _PCM and wave.order == "little":
            return wave.rate, wave.pcm(data)
        data = wave.with_size(data)
    elif len(data) + 1 < _promised(data) < _ENDLESS:  # some count a byte of padding too many
        raise DamagedError("a truncated audio file")  # soundfile would take what there is for the whole
    return _by_soundfile(name, data)


def from_pcm(data: bytes, width: int) -> NDArray[np.float32]:
    """Samples of `width` bytes (unsigned where it is 1), as WAV files have them: in [-1, 1), exact up to 24 bits."""
    raw = np.frombuffer(data, np.uint8).reshape(-1, width)
    wide = np.zeros((len(raw), 4), np.uint8)
    wide[:, 4 - width :] = raw ^ 0x80 if width == 1 else raw
    return wide.view("<i4")[:, 0].astype(np.float32) / np.float32(1 << 31)


def check_length(count: int) -> None:
    """Raise DamagedError for more samples, of all channels together, than are held in memory at once."""
    if count > _LONGEST:
        raise DamagedError(f"{count} samples, more than {_LONGEST}: split it")


def soundfile(purpose: str) -> Any:
    """The package. Raises MissingExtraError without it, or without the library that it binds."""
    try:
        import soundfile
    except (ImportError, OSError) as error:
        raise MissingExtraError("soundfile", "media", purpose) from error
    return soundfile


# --- WAV --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Wave:
    """What the header of a WAV file says, after the checks that need no samples."""

    order: Literal["little", "big"]  # of bytes: big in RIFX
    tag: int  # the format; of WAVE_FORMAT_EXTENSIBLE the one in its GUID
    channels: int
    rate: int  # frames a second
    block: int  # bytes of a frame, or of a block of compressed ones
    start: int  # of the samples, in bytes
    size: int  # of the samples that are there, in bytes
    field: slice | None  # the place of the size in the header, where it is none

    @classmethod
    def of(cls, data: bytes) -> _Wave:
        """The header of `data`. Raises DamagedError where it is cut off or wrong, or promises more than there is."""
        order: Literal["little", "big"] = "big" if data.startswith(b"RIFX") else "little"
        places = _chunks(data, order)
        start = places["data"].start
        field = slice(start - 4, start)
        whole, size = int.from_bytes(data[4:8], order), int.from_bytes(data[field], order)
        if size == 0xFFFFFFFF and "ds64" in places:  # the 64-bit sizes of RF64
            wide = places["ds64"].start
            field = slice(wide + 8, wide + 16)
            whole, size = int.from_bytes(data[wide : wide + 8], order), int.from_bytes(data[field], order)
        tag, channels, rate, block = _format(data[places["fmt "]], order)
        left = len(data) - start
        # An empty clip may be followed by other chunks: then the file is as long as its header says.
        endless = size >= _ENDLESS if size else not len(data) - 1 <= whole + 8 <= len(data) + 1
        if size > left and not endless:
            unit, what = (block, "samples") if tag in (_PCM, _FLOAT) else (1, "bytes")
            raise DamagedError(f"a WAV file that ends after {left // unit} of {size // unit} {what}")
        endless = endless and size != left
        return cls(order, tag, channels, rate, block, start, left if endless else size, field if endless else None)

    def pcm(self, data: bytes) -> NDArray[np.float32]:
        """The samples `[frames, channels]` of PCM, low byte first."""
        frames = self.size // self.block
        check_length(frames * self.channels)
        pcm = data[self.start : self.start + frames * self.block]
        return from_pcm(pcm, self.block // self.channels).reshape(-1, self.channels)

    def with_size(self, data: bytes) -> bytes:
        """The file with the true size in its header: libsndfile takes 0 at its word."""
        if self.field is None:
            return data
        size = self.size.to_bytes(self.field.stop - self.field.start, self.order)
        return b"".join((data[: self.field.start], size, data[self.field.stop :]))


def _chunks(data: bytes, order: Literal["little", "big"]) -> dict[str, slice]:
    """The places of the chunks of a WAV file up to "data", that one included. Raises DamagedError."""
    if data[8:12] not in (b"WAVE", b""):
        raise DamagedError("a damaged WAV file: its form type is not WAVE")
    places: dict[str, slice] = {}
    at = 12
    for _ in range(_CHUNKS):
        name, size = data[at : at + 4].decode("latin-1"), int.from_bytes(data[at + 4 : at + 8], order)
        at += 8
        if at > len(data) or (name != "data" and at + size > len(data)):
            raise DamagedError("a WAV file that ends in its header")
        if size < _LEAST.get(name, 0) or (name == "data" and "fmt " not in places):
            raise DamagedError("a damaged WAV file: its header does not declare the sample format")
        places[name] = slice(at, at + size)
        if name == "data":
            return places
        at += size + size % 2
    raise DamagedError(f"a damaged WAV file: no samples after {_CHUNKS} chunks")


def _format(form: bytes, order: Literal["little", "big"]) -> tuple[int, int, int, int]:
    """Tag, channels, rate and block of a "fmt " chunk. Raises DamagedError where it contradicts itself."""
    mark = "<" if order == "little" else ">"
    tag, channels, rate, _, block, bits = struct.unpack(mark + "HHIIHH", form[:16])
    if tag == _EXTENSIBLE and form[26:40] == _GUID:
        (tag,) = struct.unpack(mark + "H", form[24:26])
    known = {_PCM: range(1, 33), _FLOAT: (32, 64)}
    if rate < 1 or channels < 1 or (tag in known and bits not in known[tag]):
        what = f"{rate} samples of {bits} bits per second in {channels} channels"
        raise DamagedError(f"a damaged WAV file: {what}")
    if tag in (_PCM, _FLOAT) and block != channels * -(-bits // 8):
        what = f"{bits} bits per sample, {channels} samples in {block} bytes"
        raise DamagedError(f"a damaged WAV file: its header contradicts itself ({what})")
    return tag, channels, rate, block


# --- other files, through soundfile -----------------------------------------------------------------------------------


def _by_soundfile(name: str, data: bytes) -> tuple[int, NDArray[np.float32]]:
    package = soundfile(f"reading {shown(name)}")
    held = bytearray()  # grows with what there is, whatever the header promises
    try:
        with package.SoundFile(_Seekable(data)) as file:
            rate, channels, promised = file.samplerate, file.channels, file.frames
            if promised < _UNCOUNTED:
                check_length(promised * channels)
            # The package seeks after every piece, where libsndfile says that it can: at the end of a FLAC file without
            # a count it cannot, and nothing is read at all. In order it reads everything.
            file.seekable = lambda: False
            while len(piece := file.read(max(_PIECE // channels, 1), dtype="float32", always_2d=True)):
                held += piece.tobytes()
                check_length(len(held) // 4)
            estimated = file.format == "MP3" or promised >= _UNCOUNTED
    except package.LibsndfileError as error:
        raise DamagedError(f"a damaged or unknown audio file: {error.error_string}") from None
    found = np.frombuffer(held, np.float32).reshape(-1, channels)
    if len(found) < promised and not estimated:
        raise DamagedError(f"an audio file that ends after {len(found)} of {promised} samples")
    if not np.isfinite(found).all():
        raise DamagedError("samples that are not finite")
    return rate, found


def _is_mpeg(data: bytes) -> bool:
    """Whether an MPEG frame of layer II or III begins here: of version 1, 2 or 2.5, which is for rates below 16 kHz.

    Layer I is left to others: FF FE begins text in UTF-16.
    """
    if len(data) < 4 or data[0] != 0xFF or data[1] >> 5 != 0b111:
        return False
    version, layer, bitrate, rate = data[1] >> 3 & 3, data[1] >> 1 & 3, data[2] >> 4, data[2] >> 2 & 3
    return version != 1 and layer in (1, 2) and bitrate != 15 and rate != 3


def _promised(data: bytes) -> int:
    """The bytes that the header of another file says it has; 0 where it says nothing that soundfile would pass over."""
    if data.startswith(b"FORM"):  # AIFF
        return 8 + int.from_bytes(data[4:8], "big")
    if data.startswith(b".snd"):  # AU
        return int.from_bytes(data[4:8], "big") + int.from_bytes(data[8:12], "big")
    if data.startswith(b"riff"):  # Wave64
        return int.from_bytes(data[16:24], "little")
    if data.startswith(b"NIST_1A\n"):  # SPHERE
        keys = (rb"\A.{8} *(\d{1,9})\n", *(rb"\n%s -i (\d{1,12})\n" % key for key in _SPHERE))
        found = [re.search(key, data[:1024], re.DOTALL) for key in keys]
        header, *sizes = [int(match[1]) if match else 0 for match in found]
        return header + math.prod(sizes)
    return 0


class _Seekable(io.BytesIO):
    """Bytes in which a place before the beginning is the beginning: the library would print what is raised there."""

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: len(self.getbuffer())}[whence]
        return super().seek(max(start + offset, 0))

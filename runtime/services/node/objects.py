"""DICOM objects as they arrive: into a file, within a limit, with the digest of their data set."""

from __future__ import annotations

import hashlib
import io
import os
import re
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

from recallseg.engines.durable import make_folder

__all__ = ["Spool"]

_UID = re.compile(r"[0-9]+(\.[0-9]+)*")


class Spool(io.BytesIO):
    """A data set that is written to a file while it arrives, as a whole DICOM file.

    It never raises while writing: what arrives must be taken off the line before it can be refused.
    ``failure`` then says why, and the file takes no room any more.

    Parameters
    ----------
    folder : where the file is made.
    sop_class, sop_instance, transfer_syntax : UIDs, as the message says.
    sender, called : AE titles.
    most_bytes : of the data set.
    """

    def __init__(
        self,
        folder: Path,
        sop_class: str,
        sop_instance: str,
        transfer_syntax: str,
        sender: str,
        called: str,
        most_bytes: int,
    ) -> None:
        super().__init__()
        self._file: Any = None
        self.path = folder / f"{secrets.token_hex(8)}.dcm"
        self.failure: str = ""
        self.no_room = False
        self._most, self._bytes, self._digest = most_bytes, 0, hashlib.sha256()
        if not all(_is_uid(uid) for uid in (sop_class, sop_instance)):
            self._fail("SOP class or instance UID is none")
            return
        try:
            make_folder(folder)
            self._file = self.path.open("xb")
            self._file.write(_head(sop_class, sop_instance, transfer_syntax, sender, called))
        except OSError as error:
            self._refuse(error)

    def write(self, data: Any) -> int:
        """Take a part of the data set."""
        size = len(data)
        if self._file is not None:
            self._bytes += size
            if self._bytes > self._most:
                self._fail(f"larger than {self._most} bytes")
                return size
            try:
                self._file.write(data)
                self._digest.update(data)
            except OSError as error:
                self._refuse(error)
        return size

    def finish(self) -> str:
        """Wait until the disk has the file; return the data set's digest, or nothing: no room."""
        if self._file is not None:
            try:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
            except OSError as error:
                self._refuse(error)
        return "" if self.failure else self._digest.hexdigest()

    def discard(self) -> None:
        """Remove the file if it is still here. Harmless if repeated."""
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):  # no room for what it held, which goes anyway
                file.close()
        self.path.unlink(missing_ok=True)

    def __del__(self) -> None:
        with suppress(OSError):  # nobody is left to be told; the next start clears the folder
            self.discard()

    def _refuse(self, error: OSError) -> None:
        self.no_room = True  # whatever else the disk says, it is ours to mend, not the sender's
        self._fail(error.strerror or type(error).__name__)

    def _fail(self, why: str) -> None:
        self.failure = self.failure or why
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError:  # it could not write what it held
                self.no_room = True
            self.path.unlink(missing_ok=True)


def _is_uid(text: str) -> bool:
    return len(text) <= 64 and _UID.fullmatch(text) is not None


def _head(
    sop_class: str, sop_instance: str, transfer_syntax: str, sender: str, called: str
) -> bytes:
    """Return preamble and file meta information (PS3.10)."""
    from pydicom.dataset import FileMetaDataset
    from pydicom.filebase import DicomBytesIO
    from pydicom.filewriter import write_file_meta_info
    from pynetdicom import PYNETDICOM_IMPLEMENTATION_UID

    meta: Any = FileMetaDataset()
    meta.FileMetaInformationVersion = b"\x00\x01"
    meta.MediaStorageSOPClassUID = sop_class
    meta.MediaStorageSOPInstanceUID = sop_instance
    meta.TransferSyntaxUID = transfer_syntax
    meta.ImplementationClassUID = PYNETDICOM_IMPLEMENTATION_UID
    meta.SourceApplicationEntityTitle = sender
    meta.ReceivingApplicationEntityTitle = called
    stream = DicomBytesIO()
    stream.write(b"\0" * 128 + b"DICM")
    write_file_meta_info(stream, meta)
    return bytes(stream.getvalue())

"""Tell DICOM files from others."""

MARK = b"DICM"
# A file without the mark starts with an element of the file meta information, of the dataset in either byte order, or
# of the DIMSE message.
_STARTS = (b"\x02\0", b"\x08\0", b"\0\x08", b"\0\0\0\0\x04\0\0\0")


def is_dicom(start: bytes) -> bool:
    """Whether a file is a DICOM file, judged by its first 132 bytes: the mark ``DICM`` or a typical first element."""
    return start[128:132] == MARK or start[:4] == MARK or start.startswith(_STARTS)

"""Tell files by their names: images that Pillow decodes by itself, and files that servers or systems leave."""

from __future__ import annotations

from functools import cache

from PIL import Image

_NOT_READ = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "IPTC"}
"""EPS is run by Ghostscript, another program; the others Pillow only recognises, or decodes on Windows alone."""
_SYSTEM = frozenset(
    """
    @eadir @tmp @recycle @recently-snapshot @synoresource @sharebin #recycle #snapshot ~snapshot $recycle.bin __macosx
    lost+found system_volume_information network_trash_folder temporary_items thumbs.db ehthumbs.db desktop.ini
    """.split()
)
"""Names that file servers, operating systems and archivers leave, in lower case with _ for a space; none is a word that
a user would choose."""


@cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read."""
    Image.init()
    return tuple(sorted(set(Image.OPEN) - _NOT_READ))


@cache
def image_suffixes() -> frozenset[str]:
    """The suffixes of those formats, in lower case with their dot."""
    read = {*formats(), "MPO"}  # opened as the JPEG that its first picture is
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in read)


def format_by_suffix(path: str) -> str:
    """Pillow's name of the format that a file's suffix stands for; empty if that format is not read."""
    name = Image.registered_extensions().get(f".{path.rpartition('.')[2].lower()}", "")
    return name if name in formats() else ""


def is_of_the_system(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or made by a file server, an archiver or a file manager."""
    return name.startswith(".") or name.lower().replace(" ", "_") in _SYSTEM

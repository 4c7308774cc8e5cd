"""The plans of `client.images`."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterator, Sequence
from os import PathLike, fspath
from pathlib import Path

from stratabox.client import _convert, _requests
from stratabox.client._plans import Call, Fold, Plan, Script, Steps, Upload
from stratabox.client._transfers import ImageTransfers
from stratabox.client.errors import InvalidArgumentError
from stratabox.client.records import BuildProgress, DiskFormat, Image, ImageDeletion, Page
from stratabox.v1 import images_pb2 as pb

_SERVICE = "images"
_CHUNK = 1 << 20  # bytes
_SUFFIXES = {".qcow2": DiskFormat.QCOW2, ".raw": DiskFormat.RAW, ".img": DiskFormat.RAW}
_QCOW_MAGIC = b"QFI\xfb"


def format_by_suffix(path: Path) -> DiskFormat | None:
    """Tell the format that a file's name says; None when it says nothing."""
    return _SUFFIXES.get(path.suffix.lower())


class ImagePlans(ImageTransfers):
    """Building, importing and removing images.

    What is said of names, units and errors at `client.sandboxes` holds here too.
    """

    def build_debian(
        self,
        *,
        name: str | None = None,
        release: str | None = None,
        include: Sequence[str] = (),
        replace: bool = False,
        progress: Callable[[BuildProgress], None] | None = None,
    ) -> Plan[Image]:
        """Build a Debian guest: systemd, the guest agent, sshd, Python. Takes minutes.

        :param name: None: "debian".
        :param release: Code name; None: "bookworm".
        :param include: More Debian packages.
        :param replace: An image of that name loses the name, and is deleted if unused.
        :param progress: Called with every step.
        :raise ImageAlreadyExistsError: when the name is taken.
        :raise ImageBuildFailedError: when a step failed; nothing is left of it.
        :raise ToolMissingError: when the host lacks mmdebstrap or another program.
        :raise NoSpaceError: when the host has no room.
        """
        with _requests.checked():
            recipe = pb.DebianRecipe(release=release or "", include=include)
            request = pb.BuildImageRequest(debian=recipe, name=name or "", replace=replace)
        return _build(request, progress)

    def build_tiny(
        self,
        *,
        name: str | None = None,
        replace: bool = False,
        progress: Callable[[BuildProgress], None] | None = None,
    ) -> Plan[Image]:
        """Build a guest of a few MB: kernel, busybox, guest agent. Takes seconds.

        :param name: None: "tiny".
        :param replace: An image of that name loses the name, and is deleted if unused.
        :param progress: Called with every step.
        :raise StrataboxError: as `build_debian` does.
        """
        with _requests.checked():
            request = pb.BuildImageRequest(tiny=pb.TinyRecipe(), name=name or "", replace=replace)
        return _build(request, progress)

    def import_file(
        self,
        path: str | PathLike[str],
        *,
        name: str,
        format: DiskFormat | str | None = None,
        cloud_init: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Plan[Image]:
        """Send a disk image that boots by itself. The daemon checks and converts it.

        :param format: "qcow2" or "raw"; None: what the file's suffix says (.qcow2, .raw, .img).
        :param cloud_init: Its guests run cloud-init: each sandbox gets a seed, by which that sets
            it up at its first boot, the agent included.
        :param progress: Called with bytes sent and bytes in all.
        :raise InvalidArgumentError: when the suffix says nothing, or not what the file begins like.
        :raise OSError: when the file cannot be read.
        :raise ImageAlreadyExistsError: when the name is taken.
        :raise InvalidImageError: when the daemon refuses what is in it.
        :raise NoSpaceError: when the host has no room.
        """
        file = Path(fspath(path))
        chosen = format or format_by_suffix(file)
        if chosen is None:
            raise InvalidArgumentError(f"the name {file.name!r} does not tell the image's format")
        with _requests.checked():
            header = pb.ImportHeader(
                name=name, format=_convert.number(DiskFormat, chosen), cloud_init=cloud_init
            )
        with file.open("rb") as opened:
            is_qcow2 = opened.read(len(_QCOW_MAGIC)) == _QCOW_MAGIC
        if format is None and is_qcow2 != (chosen == DiskFormat.QCOW2):
            # Many a cloud image called .img is a qcow2. The suffix is a habit, not a statement.
            begins = "like" if is_qcow2 else "unlike"
            raise InvalidArgumentError(
                f"{file.name!r} means format {chosen}, but the file begins {begins} a qcow2: "
                "say which format it has"
            )

        def requests() -> Iterator[pb.ImportImageRequest]:
            yield pb.ImportImageRequest(header=header)
            total, sent = file.stat().st_size, 0
            with file.open("rb") as opened:
                while data := opened.read(_CHUNK):
                    yield pb.ImportImageRequest(data=data)
                    sent += len(data)
                    if progress is not None:
                        progress(sent, total)

        return Upload(_SERVICE, "ImportImage", requests(), _convert.image)

    def get(self, image: str) -> Plan[Image]:
        """Return one image as it is now."""
        with _requests.checked():
            request = pb.GetImageRequest(image=image)
        return Call(_SERVICE, "GetImage", request, _convert.image)

    def list_page(
        self, *, page_size: int | None = None, page_token: str | None = None
    ) -> Plan[Page[Image]]:
        """Return one page of the list, newest first.

        :param page_size: At most so many, 1-1000; None: 100.
        :param page_token: `next_page_token` of the page before.
        :raise InvalidArgumentError: when the token cannot be right.
        """
        with _requests.checked():
            request = pb.ListImagesRequest(page_size=page_size or 0, page_token=page_token or "")
        return Call(_SERVICE, "ListImages", request, self._page)

    def _page(self, message: pb.ListImagesResponse) -> Page[Image]:
        items = tuple(_convert.image(one) for one in message.images)
        return Page(items=items, next_page_token=message.next_page_token or None)

    def list(self) -> Plan[builtins.list[Image]]:
        """Return all images, newest first."""

        def steps() -> Steps[builtins.list[Image]]:
            found: builtins.list[Image] = []
            token: str | None = None
            while True:
                page: Page[Image] = yield self.list_page(page_size=1000, page_token=token)
                found += page.items
                token = page.next_page_token
                if token is None:
                    return found

        return Script(steps())

    def delete(self, image: str) -> Plan[ImageDeletion]:
        """Remove an image.

        :raise ImageInUseError: when something needs it; the metadata names what.
        """
        with _requests.checked():
            request = pb.DeleteImageRequest(image=image)
        return Call(_SERVICE, "DeleteImage", request, _convert.image_deletion)


def _build(
    request: pb.BuildImageRequest, progress: Callable[[BuildProgress], None] | None
) -> Plan[Image]:
    def step(message: pb.BuildImageResponse) -> Image | None:
        if message.HasField("image"):
            return _convert.image(message.image)
        if progress is not None and message.HasField("progress"):
            progress(_convert.build_progress(message.progress))
        return None

    return Fold(_SERVICE, "BuildImage", request, step)

"""Rows of the images."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Any

from stratabox.storage.catalog import lookup
from stratabox.storage.catalog.database import Row, Transaction, text_of
from stratabox.storage.model.errors import AlreadyExistsError, NotFoundError
from stratabox.storage.model.ids import ImageId, LayerId, Sha256
from stratabox.storage.model.records import Image, KernelBoot
from stratabox.storage.model.states import NEXT_IMAGE, ImageState, check_step


def insert(tx: Transaction, image: Image) -> Image:
    """Add an image; returns it with its generation.

    :raise AlreadyExistsError: IMAGE_ALREADY_EXISTS, when the name is taken.
    """
    taken = tx.row("SELECT id FROM images WHERE name = ?", (image.name,))
    if taken:
        raise AlreadyExistsError(
            f"there is an image {image.name!r} already: choose another name or delete it",
            reason="IMAGE_ALREADY_EXISTS",
            image=taken["id"],
        )
    image = replace(image, generation=tx.next_generation())
    tx.insert("images", {"id": image.id, **_columns(image)})
    return image


def resolve(tx: Transaction, reference: str) -> ImageId:
    """The id behind an id, name or start of an id.

    :raise NotFoundError: IMAGE_NOT_FOUND.
    :raise DeniedError: AMBIGUOUS_NAME.
    """
    return ImageId(lookup.resolve(tx, "images", "image", reference))


def get(tx: Transaction, image: ImageId) -> Image:
    """One image. :raise NotFoundError: IMAGE_NOT_FOUND."""
    row = tx.row("SELECT * FROM images WHERE id = ?", (image,))
    if row is None:
        raise NotFoundError(f"there is no image {image!r}", reason="IMAGE_NOT_FOUND", image=image)
    return _image(row)


def change(tx: Transaction, image: ImageId, **changes: Any) -> Image:
    """Change an image: the one function through which its row ever changes.

    :raise NotFoundError: IMAGE_NOT_FOUND.
    :raise InternalError: when the change of state is not legal.
    """
    old = get(tx, image)
    new = replace(old, **changes, generation=tx.next_generation())
    check_step(NEXT_IMAGE, old.state, new.state)
    tx.update("images", image, _columns(new))
    return new


def delete(tx: Transaction, image: ImageId) -> None:
    """Remove the row."""
    tx.execute("DELETE FROM images WHERE id = ?", (image,))


def list_page(tx: Transaction, page: lookup.Page = lookup.FIRST_PAGE) -> tuple[list[Image], str]:
    """One page, newest first, and the next page's token ("" on the last).

    :raise InvalidArgumentError: for a page that cannot be.
    """
    rows, token = lookup.list_page(tx, "images", page, [], {})
    return [_image(row) for row in rows], token


def everything(tx: Transaction) -> list[Image]:
    """All images, oldest first."""
    return [_image(row) for row in tx.rows("SELECT * FROM images ORDER BY created_at, id")]


def _columns(image: Image) -> dict[str, Any]:
    boot = image.kernel_boot
    return {
        "name": image.name,
        "state": image.state,
        "origin": image.origin,
        "layer": image.layer,
        "size": image.size,
        "kernel": boot.kernel if boot else None,
        "initrd": boot.initrd if boot else None,
        "command_line": boot.command_line if boot else None,
        "cloud_init": image.cloud_init,
        "created_at": text_of(image.created_at),
        "generation": image.generation,
    }


def _image(row: Row) -> Image:
    boot = None
    if row["kernel"] is not None:
        boot = KernelBoot(
            kernel=Sha256(row["kernel"]),
            initrd=Sha256(row["initrd"]),
            command_line=row["command_line"],
        )
    return Image(
        id=ImageId(row["id"]),
        name=row["name"],
        state=ImageState(row["state"]),
        origin=row["origin"],
        layer=None if row["layer"] is None else LayerId(row["layer"]),
        size=row["size"],
        kernel_boot=boot,
        cloud_init=bool(row["cloud_init"]),
        created_at=datetime.fromisoformat(row["created_at"]),
        generation=row["generation"],
    )

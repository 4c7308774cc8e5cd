"""What the calls have in common: parameters of paths, queries and headers, and replies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, TypeVar
from urllib.parse import urlencode

from fastapi import Header, Path, Query
from pydantic import BaseModel, TypeAdapter
from starlette.responses import Response

from stratabox.storage.catalog import lookup

JSON = "application/json"

Reference = Annotated[
    str, Path(min_length=1, max_length=1024, description="Its id, or a name that only it has.")
]
IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=256,
        pattern=r"^[!-~]+$",
        description="The same key and request again give the same answer, and make nothing new.",
    ),
]
PageSize = Annotated[int, Query(ge=1, le=lookup.LARGEST_PAGE, description="Entries at most.")]
PageToken = Annotated[
    str | None, Query(max_length=1024, description="From the Link header of the page before.")
]

Model = TypeVar("Model", bound=BaseModel)


def one(model: BaseModel, *, status: int = 200) -> Response:
    """One thing."""
    return Response(model.model_dump_json(), status_code=status, media_type=JSON)


def page(kind: type[Model], found: Sequence[Model], path: str, size: int, token: str) -> Response:
    """A page of a list; where there is another, the Link header (RFC 8288) leads to it."""
    body = TypeAdapter(list[kind]).dump_json(list(found))  # type: ignore[valid-type]
    query = urlencode({"page_size": size, "page_token": token})
    headers = {"link": f'<{path}?{query}>; rel="next"'} if token else None
    return Response(body, headers=headers, media_type=JSON)

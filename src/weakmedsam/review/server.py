"""The pages of a review over HTTP: cases, their layers, clicks and decisions. Who may ask: ``guard.py``."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from weakmedsam.errors import WeakMedSAMError
from weakmedsam.figures import CLASS_COLOURS
from weakmedsam.review.correction import Changes
from weakmedsam.review.guard import HEADERS, HOSTS, Guard, read_key
from weakmedsam.review.session import Case, RefusedError, Session
from weakmedsam.run.clicks import ACCEPTED, REJECTED, Click

OTHER_PLANES = {
    "axial": ("coronal", "sagittal"),
    "coronal": ("axial", "sagittal"),
    "sagittal": ("axial", "coronal"),
}
"""Plane of the slices -> the planes along their rows and along their columns."""


def build_app(session: Session, port: int, key: str) -> ASGIApp:
    """The application: page, cases, layers of a case, clicks, decisions.

    Args:
        session: the run under review.
        port: that it will be reached at.
        key: see ``read_key``.
    """
    routes = [
        Route("/", _page(session)),
        Route("/cases", _reading(session, _list_cases)),
        Route("/cases/{case}", _reading(session, _describe)),
        Route("/cases/{case}/{layer}.raw", _reading(session, _layer)),
        Route("/cases/{case}/click", _changing(session, _click), methods=["POST"]),
        Route("/cases/{case}/undo", _changing(session, _undo), methods=["POST"]),
        Route("/cases/{case}/decide", _changing(session, _decide), methods=["POST"]),
    ]
    return Guard(Starlette(routes=routes), port, key)


def serve(session: Session, door: socket.socket, ready: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C.

    Args:
        session: the run under review.
        door: of ``listen``.
        ready: told the address that opens it.
    """
    port, key = door.getsockname()[1], read_key(session.run)
    ready(f"http://{HOSTS[0]}:{port}/?key={key}")
    app = build_app(session, port, key)
    uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", ws="none")).run(sockets=[door])


def _page(session: Session) -> Callable[[Request], Response]:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("page.html").render(
        run=str(session.run),
        classes=session.class_names,
        colours=CLASS_COLOURS,
        planes=OTHER_PLANES[session.plane],
    )
    return lambda request: Response(page, headers=HEADERS, media_type="text/html")


def _reading(session: Session, answer: Callable[..., Response]) -> Callable[[Request], Response]:
    """A route that reads; an error is a message."""

    def endpoint(request: Request) -> Response:
        name = request.path_params.get("case")
        if name is not None and name not in session.cases:
            return _problem("there is no such case", 404)
        try:
            return answer(session, **request.path_params)
        except WeakMedSAMError as error:
            return _problem(str(error), 500)

    return endpoint


def _changing(session: Session, change: Callable[..., dict[str, Any]]) -> Callable[[Request], Any]:
    """A route that changes something: JSON in, JSON out."""

    def answer(name: str, body: dict[str, Any]) -> Response:
        try:
            found = change(session, name, body)
        except (KeyError, TypeError, ValueError) as error:
            return _problem(f"not understood: {error!r}", 400)
        except RefusedError as error:
            return _problem(str(error), 409)
        except WeakMedSAMError as error:
            return _problem(str(error), 500)
        return JSONResponse(found | _standing(session, name), headers=HEADERS)

    async def endpoint(request: Request) -> Response:
        name = request.path_params["case"]
        if name not in session.cases:
            return _problem("there is no such case", 404)
        try:
            body = await request.json()
        except ValueError:
            return _problem("not understood: no JSON", 400)
        return await run_in_threadpool(answer, name, body if isinstance(body, dict) else {})

    return endpoint


def _problem(said: str, status: int) -> Response:
    return JSONResponse({"problem": said}, status, HEADERS)


def _list_cases(session: Session) -> Response:
    cases = [
        {"name": name, "unsure": round(case.mean_unsure, 4), **_progress(session, name)}
        for name, case in session.cases.items()
    ]
    return JSONResponse(cases, headers=HEADERS)


def _progress(session: Session, name: str) -> dict[str, Any]:
    """What the list shows of a case."""
    own = session.reviewed.of_case(name)
    whole = next((held.decision for held in own.decisions if held.slice is None), None)
    return {"clicks": len(own.clicks), "decision": whole}


def _describe(session: Session, case: str) -> Response:
    held = session.cases[case]
    frame, spacing = held.entry.frame, held.entry.geometry.spacing
    scale = frame.side / frame.size
    told = {
        "name": case,
        "slices": held.entry.depth,
        "size": frame.size,
        "up": session.plane == "axial",
        "spacing": [spacing[0], spacing[1] * scale, spacing[2] * scale],
        "present": held.present.astype(int).tolist(),
        "order": held.rows,
        "unsure": [None if value != value else round(value, 4) for value in held.unsure.tolist()],
        "layers": _layers(session, held),
        **_standing(session, case),
    }
    task = BackgroundTask(session.networks.look_ahead, held.entry, held.rows)
    return JSONResponse(told, headers=HEADERS, background=task)


def _standing(session: Session, name: str) -> dict[str, Any]:
    """Clicks and decisions of a case as they are."""
    own = session.reviewed.of_case(name)
    return {
        **_progress(session, name),
        "points": [click[1:6] for click in own.clicks],
        "states": session.states(name),
        "rejected": [d.slice for d in own.decisions if d.slice is not None and d.decision == REJECTED],
    }


def _layers(session: Session, case: Case) -> list[str]:
    found = ["image", "original", "label", "cam"]
    found += ["prediction"] if session.networks.has_prediction else []
    return found + (["mask"] if case.entry.has_mask else [])


def _layer(session: Session, case: str, layer: str) -> Response:
    """Raw little-endian numbers, (D, ...), shape in a header: the page draws them."""
    held = session.cases[case]
    if layer not in _layers(session, held):
        return _problem("there is no such layer", 404)
    found: NDArray[Any]
    if layer == "image":
        found = session.reader.image(case)
    elif layer == "mask":
        found = session.reader.mask(case)
    elif layer == "cam":
        found = session.networks.cams(held.entry, sorted(held.rows))
    elif layer == "prediction":
        found = session.networks.prediction(held.entry)
    else:
        volume = session.volume(case)
        found = volume.label if layer == "label" else volume.original.label
    content = np.ascontiguousarray(found.astype(found.dtype.newbyteorder("<"), copy=False)).tobytes()
    shape = ",".join(map(str, found.shape))
    return Response(content, headers={**HEADERS, "X-Shape": shape}, media_type="application/octet-stream")


def _sent(changes: Changes) -> dict[str, Any]:
    """Slices as run lengths: (value, length) after each other, row by row."""
    return {"slices": {str(z): _runs(ids) for z, ids in changes.items()}}


def _runs(ids: NDArray[np.uint8]) -> list[int]:
    flat = ids.ravel()
    starts = np.flatnonzero(np.r_[True, flat[1:] != flat[:-1]])
    lengths = np.diff(np.r_[starts, flat.size])
    return np.stack([flat[starts].astype(np.int64), lengths], axis=1).ravel().tolist()


def _click(session: Session, name: str, body: dict[str, Any]) -> dict[str, Any]:
    entry = session.cases[name].entry
    number, x, y = (_whole(body[key]) for key in ("slice", "x", "y"))
    if not (number < entry.depth and max(x, y) < entry.frame.size):
        raise ValueError("outside the volume")
    if body["class"] not in session.class_names or body["sign"] not in (1, -1):
        raise ValueError("class or sign")
    return _sent(session.click(name, Click(name, number, x, y, body["sign"], body["class"])))


def _undo(session: Session, name: str, body: dict[str, Any]) -> dict[str, Any]:
    return _sent(session.undo(name))


def _decide(session: Session, name: str, body: dict[str, Any]) -> dict[str, Any]:
    number, decision = body["slice"], body["decision"]
    if number is not None and _whole(number) >= session.cases[name].entry.depth:
        raise ValueError("outside the volume")
    if decision not in (ACCEPTED, REJECTED, None):
        raise ValueError("decision")
    session.decide(name, number, decision)
    return {"slices": {}}


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no whole number from 0 on")
    return value

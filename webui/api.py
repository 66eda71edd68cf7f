"""Routes beside the host's own, for programs: train, watch, stop, save, list, report, apply."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from typing import Any

from ..erase_core import Erasure, ErasureFileError, SettingsError
from ..erase_core.artefact.numbers import report_numbers
from ..erase_core.artefact.report import report_text
from . import loras
from .accordion import EVERYWHERE
from .jobs import DONE, JOBS, Job, NoSuchJobError

PREFIX = "/concept-surgery/v1"


def on_app_started(_demo: Any, app: Any) -> None:
    """Add the routes, where the host's own API is switched on."""
    from modules import shared

    if getattr(shared.cmd_opts, "api", False) or getattr(shared.cmd_opts, "nowebui", False):
        add_routes(app, getattr(shared.cmd_opts, "api_auth", None))


def add_routes(app: Any, credentials: str | None) -> None:
    """Add the routes to a FastAPI application.

    Args:
        credentials: of the host's API, "name:password" with commas between; None for none.
    """
    from fastapi import Depends

    locks = [Depends(_lock(credentials))] if credentials else []
    routes: tuple[tuple[str, str, Callable[..., Any]], ...] = (
        ("POST", "train", train),
        ("GET", "jobs", jobs),
        ("GET", "jobs/{number}", job),
        ("POST", "stop", stop),
        ("POST", "save", save),
        ("GET", "erasures", erasures),
        ("GET", "report", report),
        ("GET", "apply", applied),
        ("POST", "apply", apply),
    )
    for method, path, does in routes:
        endpoint = _takes_body(does) if method == "POST" else _answered(does)
        app.add_api_route(f"{PREFIX}/{path}", endpoint, methods=[method], dependencies=locks)


def train(given: Mapping[str, Any]) -> dict[str, Any]:
    """Begin a training; the values are those of the tab, by the names in ``form.INPUTS``."""
    return described(JOBS.start(given))


def jobs() -> list[dict[str, Any]]:
    """All trainings that are remembered."""
    return [described(one) for one in JOBS.all()]


def job(number: str) -> dict[str, Any]:
    """How far a training is, and what came of it; "latest" is the newest."""
    return described(JOBS.get("" if number == "latest" else number))


def stop(given: Mapping[str, Any]) -> dict[str, Any]:
    """End a training: soon, keeping what was learned, or at once with ``"keep": false``."""
    one = JOBS.get(str(given.get("id", "")))
    if given.get("keep", True):
        one.stop()
    else:
        one.cancel()
    return described(one)


def save(given: Mapping[str, Any]) -> dict[str, Any]:
    """Write what a training learned into the host's LoRA folder."""
    one = JOBS.get(str(given.get("id", "")))
    if one.erasure is None:
        raise ErasureFileError(f"Training {one.id} has nothing to save ({one.state}).")
    filename = given.get("filename")
    if not isinstance(filename, str):
        raise SettingsError(f"filename must be text, not {filename!r:.60}.", "filename")
    path, problem = loras.save(one.erasure, filename)
    one.saved = path
    return {"path": str(path), "name": path.stem, "tag": loras.tag_of(path.stem), "note": problem}


def erasures() -> list[str]:
    """Names of the erasures in the host's LoRA folder."""
    return loras.erasures()


def report(name: str = "", number: str = "") -> dict[str, Any]:
    """The report of an erasure in the folder, or of a training."""
    if name:
        record, notes = Erasure.load(loras.path_of(name)).record, []
    else:
        one = JOBS.get(number)
        if one.outcome is None:
            raise NoSuchJobError(f"Training {one.id} has no report yet ({one.state}).")
        record, notes = one.outcome.erasure.record, one.outcome.notes
    return {"text": report_text(record, notes), "numbers": report_numbers(record)}


def applied() -> dict[str, Any]:
    """What is applied to every picture."""
    return {"erasures": list(EVERYWHERE.applied.names), "strength": EVERYWHERE.applied.strength}


def apply(given: Mapping[str, Any]) -> dict[str, Any]:
    """Apply erasures to every picture from now on; an empty list ends it."""
    EVERYWHERE.set(given.get("erasures"), given.get("strength", 1.0))
    return applied()


def described(one: Job) -> dict[str, Any]:
    """A training as plain values."""
    progress, told = one.progress, {}
    if progress is not None:
        told = {
            "stage": progress.stage,
            "share": 1.0 if one.state == DONE else progress.share,
            "step": progress.step,
            "steps": progress.steps,
            "loss": progress.loss,
            "seconds_left": progress.seconds_left,
        }
    return {
        "id": one.id,
        "state": one.state,
        "before": JOBS.before(one),
        "stopping": one.stopping,
        "message": one.message,
        "setting": one.setting,
        "saved": None if one.saved is None else str(one.saved),
        "curve": [[point.done, point.left, point.drift] for point in one.curve],
        **told,
    }


def _takes_body(does: Callable[[Mapping[str, Any]], Any]) -> Callable[..., Any]:
    from fastapi import Body

    def endpoint(given: dict = Body(default={})) -> Any:  # noqa: B006, B008
        return _or_error(lambda: does(given))

    endpoint.__name__, endpoint.__doc__ = f"concept_surgery_{does.__name__}", does.__doc__
    return endpoint


def _answered(does: Callable[..., Any]) -> Callable[..., Any]:
    from functools import wraps

    @wraps(does)
    def endpoint(*given: Any, **named: Any) -> Any:
        return _or_error(lambda: does(*given, **named))

    return endpoint


def _or_error(does: Callable[[], Any]) -> Any:
    """What a route answers; an error is a sentence, with the input that it is about."""
    from fastapi import HTTPException

    try:
        return does()
    except NoSuchJobError as error:
        raise HTTPException(404, detail={"message": str(error.args[0])}) from error
    except (SettingsError, ErasureFileError, ValueError) as error:
        detail = {"message": str(error), "setting": getattr(error, "setting", "")}
        raise HTTPException(422, detail=detail) from error


def _lock(credentials: str) -> Callable[..., None]:
    """The lock that the host's own API has."""
    from fastapi import Depends, HTTPException
    from fastapi.security import HTTPBasic

    pairs = (one.partition(":") for one in credentials.split(","))
    known = {name.strip(): password.strip() for name, _, password in pairs}

    def check(given=Depends(HTTPBasic())):  # noqa: B008
        password = known.get(given.username)
        same = password is not None and secrets.compare_digest(
            given.password.encode(), password.encode()
        )
        if not same:
            raise HTTPException(
                401, detail="Incorrect username or password", headers={"WWW-Authenticate": "Basic"}
            )

    return check

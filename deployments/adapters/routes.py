"""``/v1/adapters`` and vLLM's two endpoints over an ``AdapterAdmin``. Knows nothing of Ray."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from adapter_store.errors import AdapterNotFound
from adapter_store.references import parse_reference
from adapter_store.source import AdapterRef
from deployments.adapters.admin import AdapterAdmin
from deployments.protocol.adapters import AdapterBody, LoadLoraBody, UnloadLoraBody
from deployments.protocol.errors import ApiError, from_exception, invalid
from deployments.tenants.caller import Caller, CallerOf
from deployments.tenants.open_mode import is_loopback

Access = Literal["loopback", "on", "off"]
_FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")


def add_adapter_routes(
    app: FastAPI, admin: AdapterAdmin, access: Access, refused: Callable[[], str | None] = lambda: None
) -> None:
    """access: who may use them. refused: why the last ``user_config`` is not in force, for listings."""

    router = APIRouter(prefix="/v1", dependencies=[Depends(admin_rule(access))])
    actions: dict[str, Callable[[str], Awaitable[dict[str, Any]]]] = {
        "prefetch": admin.prefetch,
        "pin": admin.pin,
        "unpin": admin.unpin,
        "refresh": admin.refresh,
    }

    @router.get("/adapters")
    async def list_adapters(after: str = "", limit: Annotated[int, Query(ge=1, le=10_000)] = 1000) -> dict[str, Any]:
        shown, more = await admin.page(after, limit)
        return {"object": "list", "data": shown, "has_more": more, "user_config_refused": refused()}

    @router.post("/adapters")
    async def declare(body: AdapterBody) -> JSONResponse:
        added = await admin.declare(body.name, body.reference, pinned=body.pinned, replace=body.replace)
        return JSONResponse(added.adapter, status_code=201 if added.new else 200)

    @router.get("/adapters/{name:path}")
    async def get(name: str) -> dict[str, Any]:
        return await admin.get(name)

    @router.delete("/adapters/{name:path}")
    async def remove(request: Request, name: str, wait_s: float = 0.0) -> dict[str, Any]:
        for unknown in request.query_params.keys() - {"wait_s"}:  # a wait that is misspelt must not be no wait
            raise invalid(unknown, f"unknown query parameter {unknown!r}: there is wait_s, in seconds")
        await admin.remove(name, wait_s)
        return {"object": "adapter", "name": name, "deleted": True}

    @router.post("/adapters/{name_and_action:path}")
    async def act(name_and_action: str) -> dict[str, Any]:
        name, _, action = name_and_action.rpartition(":")
        if action not in actions or not name:
            raise ApiError(404, f"there is no action {action!r}: {', '.join(actions)}", code="not_found")
        return await actions[action](name)

    @router.post("/load_lora_adapter")
    async def load_lora_adapter(body: LoadLoraBody) -> Response:
        if not body.lora_name or not body.lora_path:
            return _vllm_error(400, "Both 'lora_name' and 'lora_path' must be provided.", "InvalidUserInput")
        try:
            added = await admin.declare(body.lora_name, lora_reference(body.lora_path), replace=body.load_inplace)
            if not added.new and not body.load_inplace:
                raise ApiError(409, "it is declared already", param="replace", code="adapter_exists")
            if not added.new:
                await admin.refresh(body.lora_name)
        except Exception as error:
            return _vllm_refusal(error, body.lora_name, body.lora_path)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post("/unload_lora_adapter")
    async def unload_lora_adapter(body: UnloadLoraBody) -> Response:
        if not body.lora_name:
            message = "'lora_name' needs to be provided to unload a LoRA adapter."
            return _vllm_error(400, message, "InvalidUserInput")
        try:
            await admin.remove(body.lora_name, body.wait_s)
        except AdapterNotFound:
            return _vllm_error(404, f"The lora adapter '{body.lora_name}' cannot be found.", "NotFoundError")
        except Exception as error:
            return _vllm_refusal(error, body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    app.include_router(router)


def admin_rule(access: Access) -> Callable[[Request, Caller], None]:
    """What lets an operator's requests through: a dependency that raises ApiError, 403, for others."""

    def allowed(request: Request, caller: CallerOf) -> None:
        code = "admin_disabled"
        if access == "off":
            message = (
                "nobody administers adapters over HTTP here: the setting gateway.admin is 'off'; 'loopback' lets "
                "clients of the server's own machine in, 'on' others too"
            )
        elif caller.role == "tenant":
            code, message = "admin_key_required", "adapters are administered with an admin key, not with a tenant's"
        elif access == "loopback" and not from_this_machine(request):
            message = (
                "adapters are administered from the server's own machine only: the setting gateway.admin is "
                "'loopback'; 'on' lets others in, with an admin key where there is a gateway.keys_file, else everybody"
            )
        else:
            return
        raise ApiError(403, message, kind="permission_error", code=code)

    return allowed


def lora_reference(path: str) -> str:
    """vLLM's ``lora_path`` as a reference: one already, a folder of this machine, or a repository of the Hub."""
    try:
        return str(parse_reference(path))
    except ValueError:
        if path.startswith(("/", "~", "./", "../")):
            return f"local:{path}"
    if _is_folder(path):
        raise invalid(
            "lora_path",
            f"lora_path is {path!r}, a folder: give it as an absolute path, {str(Path(path).absolute())!r}; "
            f"a repository of the Hub that has this name is hub:{path}",
        )
    try:
        return str(AdapterRef.parse(f"hub:{path}"))
    except ValueError:
        raise invalid("lora_path", f"lora_path is {path!r}: an absolute folder, org/name, or a reference") from None


def _is_folder(path: str) -> bool:
    try:
        return Path(path).is_dir()
    except OSError:  # a name longer than the file system allows
        return False


def from_this_machine(request: Request) -> bool:
    """Whether a client of this machine sent the request, neither through a proxy nor from a foreign web page."""
    headers = request.headers
    if any(name in headers for name in _FORWARDED) or os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", "0") == "1":
        return False
    names = [request.client.host if request.client else "", urlsplit(f"//{headers.get('host', '')}").hostname or ""]
    if origin := headers.get("origin"):
        names.append(urlsplit(origin).hostname or "")
    return all(map(is_loopback, names))


def _vllm_error(status: int, message: str, kind: str) -> JSONResponse:
    return JSONResponse(
        {"error": {"message": message, "type": kind, "param": None, "code": status}}, status_code=status
    )


def _vllm_refusal(error: Exception, name: str, path: str = "") -> JSONResponse:
    """vLLM's shape for what we refuse: its 404 for what is not there, 400 for what its caller can put right."""
    told = from_exception(error)
    if told.code == "internal_error":
        raise error  # logged, and told in the envelope that every such error has
    if told.code == "adapter_exists" and told.param == "replace":  # else load_inplace is no remedy
        remedy = "If you want to load the adapter in place, set 'load_inplace' to True."
        return _vllm_error(400, f"The lora adapter '{name}' has already been loaded. {remedy}", "InvalidUserInput")
    kinds = {404: "NotFoundError", 409: "InvalidUserInput", 400: "InvalidUserInput", 422: "BadRequestError"}
    status = {404: 404, 409: 400, 400: 400, 422: 400}.get(told.status, 500)
    message = told.message
    if f"reference hub:{path}:" in message:  # a folder that only its caller sees, or that there is not, looks alike
        message += f" ({path!r} was taken for a repository of the Hub: a folder is given as an absolute path)"
    return _vllm_error(status, message, kinds.get(told.status, "InternalServerError"))

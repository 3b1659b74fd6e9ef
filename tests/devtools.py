"""A headless browser, driven over the DevTools protocol: pages are clicked through as people do."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import threading
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import aiohttp

T = TypeVar("T")
BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
PATIENCE = 60.0  # seconds that anything may take on a busy machine
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39}
TEXT_OF = {"Enter": "\r", " ": " "}
CONTROL, SHIFT = 2, 8


class Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What a coroutine returns."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(PATIENCE)

    def close(self) -> None:
        """End the thread."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(PATIENCE)
        self.loop.close()


class Page:
    """A tab. `console`: what it complained of; `requests`: the addresses it asked for; `login`: name and password."""

    def __init__(self, browser: Browser, session: str, login: tuple[str, str] | None) -> None:
        self.browser, self.session, self.login = browser, session, login
        self.console: list[str] = []
        self.requests: list[str] = []

    def send(self, method: str, **params: object) -> dict[str, Any]:
        """One command of the protocol."""
        return self.browser.send(method, self.session, **params)

    def event(self, method: str, params: dict[str, Any]) -> None:
        """Note an event."""
        if method == "Runtime.exceptionThrown":
            self.console.append(json.dumps(params["exceptionDetails"])[:1000])
        elif method == "Runtime.consoleAPICalled":
            self.console.append(f"{params['type']}: {[one.get('value') for one in params['args']]}")
        elif method == "Log.entryAdded":
            self.console.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Fetch.requestPaused":
            self.browser.post("Fetch.continueRequest", self.session, requestId=params["requestId"])
        elif method == "Fetch.authRequired" and self.login:
            answer = {"response": "ProvideCredentials", "username": self.login[0], "password": self.login[1]}
            answered = {"requestId": params["requestId"], "authChallengeResponse": answer}
            self.browser.post("Fetch.continueWithAuth", self.session, **answered)

    def run(self, script: str) -> Any:
        """The value of an expression, or of the promise that it is."""
        options = {"returnByValue": True, "awaitPromise": True, "userGesture": True}
        found = self.send("Runtime.evaluate", expression=script, **options)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, script: str) -> None:
        """Wait for an expression to be true."""
        end = time.monotonic() + PATIENCE
        while not self.run(f"Boolean({script})"):
            assert time.monotonic() < end, (script, self.console, self.run("document.body.innerText"))
            time.sleep(0.03)

    def text(self, selector: str) -> str:
        """The text of an element."""
        return self.run(f"document.querySelector({json.dumps(selector)}).textContent")

    def click(self, selector: str) -> None:
        """A click of the mouse, in the middle of an element that is in sight."""
        found = json.dumps(selector)
        x, y = self.run(f"""(() => {{
          const node = document.querySelector({found});
          node.scrollIntoView({{block: "center"}});
          const box = node.getBoundingClientRect();
          return [box.x + box.width / 2, box.y + box.height / 2];
        }})()""")
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, text: str) -> None:
        """Text at the focus."""
        self.send("Input.insertText", text=text)

    def press(self, key: str, modifiers: int = 0) -> None:
        """A key, pressed and released."""
        code = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": modifiers}
        text = {"text": TEXT_OF[key]} if key in TEXT_OF else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", **code, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", **code)

    def screenshot(self) -> bytes:
        """The whole page, as PNG."""
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(shot["data"])

    def resize(self, width: int, height: int = 900) -> None:
        """Another width of the window."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", **size)

    def scheme(self, name: str) -> None:
        """dark or light."""
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def close(self) -> None:
        """Close the tab."""
        self.browser.send("Target.closeTarget", targetId=self.browser.targets.pop(self.session))
        self.browser.pages.pop(self.session)


class Browser:
    """A browser, and the connection to it."""

    def __init__(self, loop: Loop, address: str) -> None:
        self.loop, self.numbers = loop, itertools.count(1)
        self.waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.pages: dict[str, Page] = {}
        self.targets: dict[str, str] = {}
        loop.run(self.connect(address))

    async def connect(self, address: str) -> None:
        """Open the socket."""
        self.client = aiohttp.ClientSession()
        self.socket = await self.client.ws_connect(address, max_msg_size=0)
        self.reader = asyncio.ensure_future(self.read())

    async def read(self) -> None:
        """Answers to those that wait for them, events to their pages."""
        try:
            async for message in self.socket:
                body = json.loads(message.data)
                if waiting := self.waiting.pop(body.get("id", 0), None):
                    waiting.set_result(body)
                elif "method" in body and (page := self.pages.get(body.get("sessionId", ""))):
                    page.event(body["method"], body["params"])
        finally:
            for waiting in self.waiting.values():
                waiting.cancel()

    def send(self, method: str, session: str | None = None, **params: object) -> dict[str, Any]:
        """The result of one command. Raises AssertionError for an error."""

        async def sent() -> dict[str, Any]:
            number = next(self.numbers)
            self.waiting[number] = asyncio.get_running_loop().create_future()
            await self.socket.send_json(
                {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
            )
            return await self.waiting[number]

        answer = self.loop.run(sent())
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def post(self, method: str, session: str, **params: object) -> None:
        """Send a command, and do not wait for its result. Of the event loop."""
        command = {"id": next(self.numbers), "method": method, "params": params, "sessionId": session}
        self.posted = asyncio.ensure_future(self.socket.send_json(command))

    def open(self, url: str, login: tuple[str, str] | None = None) -> Page:
        """A page in a tab of its own; `login` is what is typed where the browser asks for it."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.targets[session] = target
        page = self.pages[session] = Page(self, session, login)
        for domain in ("Page", "Runtime", "Network", "Log", "Accessibility"):
            page.send(f"{domain}.enable")
        if login:
            page.send("Fetch.enable", handleAuthRequests=True)
        page.resize(1280)
        page.send("Page.navigate", url=url)
        page.until("document.readyState === 'complete' && location.href !== 'about:blank'")
        return page

    async def disconnect(self) -> None:
        """Close the socket."""
        await self.client.close()
        await asyncio.gather(self.reader, return_exceptions=True)


@contextlib.contextmanager
def browser(loop: Loop, home: Path) -> Iterator[Browser]:
    """A browser that runs as long as the context, with a fresh profile under `home`; it resolves no names."""
    profile = home / "profile"
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--mute-audio"]
    options += [
        "--remote-debugging-port=0",
        f"--user-data-dir={profile}",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ]
    with (home / "browser.log").open("wb") as log, subprocess.Popen([BROWSER, *options], stdout=log, stderr=log) as run:
        try:
            end, told = time.monotonic() + PATIENCE, profile / "DevToolsActivePort"
            while not (told.exists() and len(told.read_text().split()) == 2):
                assert run.poll() is None and time.monotonic() < end, (home / "browser.log").read_text()[-2000:]
                time.sleep(0.03)
            port, path = told.read_text().split()
            found = Browser(loop, f"ws://127.0.0.1:{port}{path}")
            try:
                yield found
            finally:
                loop.run(found.disconnect())
        finally:
            run.terminate()
            run.wait(PATIENCE)
            shutil.rmtree(profile, ignore_errors=True)

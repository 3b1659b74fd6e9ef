"""The page of the server, clicked through in a browser, in front of an API with fixed answers."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import math
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from bytelm.serve import page
from devtools import BROWSER, CONTROL, PATIENCE, Browser, Loop, Page, browser

pytestmark = pytest.mark.skipif(not BROWSER, reason="there is no chromium or google-chrome here")

SIDE = 8  # pixels of a picture of the API below
TURNED = "\u202e"  # what turns the text after it around, and is not to be seen
STORY = f"the sea — <b>grün</b>\n{TURNED}".encode() + b"\xff!"
CARD = {"object": "model", "created": 0, "owned_by": "bytelm", "max_model_len": 4096, "step": 7, "bits_per_byte": 1.25}
PICTURES = {"name": "image", "suffix": ".png", "media_type": "image/png", "size": 3 * SIDE**2, "unit": 3, "row": 24}
MODELS = [
    {
        "id": "cut",
        "description": "blt over entropy patches",
        "parameters": 1234,
        "patches": "entropy",
        "modality": None,
    },
    {"id": "plain", "description": "transformer", "parameters": 99, "patches": "", "modality": None},
    {"id": "pictures", "description": "megabyte", "parameters": 5, "patches": "fixed"}
    | {"modality": PICTURES | {"text": False}},
    {"id": "pieces", "description": "bpe", "parameters": 9, "patches": "tokens", "modality": None},
]


def name_of(byte: int) -> str:
    return chr(byte) if byte < 128 else f"bytes:\\x{byte:02x}"


def data_of(body: dict[str, Any]) -> bytes:
    return base64.b64decode(body["prompt_b64"])


class Api:
    """Answers that can be foreseen: a byte b takes b % 8 bits, patches start at spaces; STORY is told for ever."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.left = 0
        """Streams that the client left."""
        self.pause = 0.0
        """Seconds between the bytes of a stream."""
        self.fails: tuple[int, str] | None = None
        """What requests for completions are refused with."""
        self.breaks = 0
        """The byte of a stream at which it fails."""
        routes = {"/v1/completions": self.completions, "/v1/patches": self.patches}
        routes |= {"/v1/encode": self.encode, "/v1/decode": self.decode}
        self.app = Starlette(routes=[
            Route("/", self.page), Route("/v1/models", self.models),
            *(Route(path, call, methods=["POST"]) for path, call in routes.items()),
        ])  # fmt: skip

    async def page(self, _: Request) -> Response:
        document = page.document()
        headers = {"content-security-policy": document.policy}
        return Response(document.body, media_type="text/html", headers=headers)

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [CARD | one for one in MODELS]})

    async def body(self, request: Request) -> dict[str, Any]:
        body = await request.json()
        self.asked.append((request.url.path, body))
        return body

    async def completions(self, request: Request) -> Response:
        body = await self.body(request)
        if self.fails:
            status, message = self.fails
            return JSONResponse(
                {"error": {"message": message}}, status, {"retry-after": "0.2"} if status == 429 else {}
            )
        if body.get("stream"):
            return StreamingResponse(self.stream(body), media_type="text/event-stream")
        data = data_of(body)
        nats = [-math.log(2) * (byte % 8) for byte in data]
        best = {"e": math.log(0.5), "bytes:\\xe2": math.log(0.25), "\n": math.log(0.125), "<eos>": math.log(0.0625)}
        logprobs = {
            "tokens": [*map(name_of, data), "e"], "token_logprobs": [*nats, math.log(0.5)],
            "top_logprobs": [best] * (len(data) + 1), "bytes": [*data, 101],
        }  # fmt: skip
        return JSONResponse({"choices": [{"index": 0, "logprobs": logprobs}]})

    async def stream(self, body: dict[str, Any]):
        try:
            for at in range(body["max_tokens"]):
                if self.breaks and at == self.breaks:
                    yield 'data: {"error": {"message": "the sequence failed"}}\n\n'
                    return
                byte = STORY[at % len(STORY)] if "logprobs" in body else 200
                one = {"index": 0, "text": "", "bytes_b64": base64.b64encode(bytes([byte])).decode()}
                one |= {"finish_reason": "length" if at == body["max_tokens"] - 1 else None}
                if "logprobs" in body:
                    one |= {"logprobs": {"token_logprobs": [-math.log(2) * (byte % 8)], "bytes": [byte]}}
                yield f"data: {json.dumps({'choices': [one]})}\n\n"
                await asyncio.sleep(self.pause)
            yield "data: [DONE]\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            self.left += 1
            raise

    async def patches(self, request: Request) -> Response:
        data = data_of(await self.body(request))
        starts = [at for at, byte in enumerate(data) if at == 0 or byte == 32]
        return JSONResponse({"patch_starts": starts, "entropy_bits": [float(byte % 5) for byte in data]})

    async def encode(self, request: Request) -> Response:
        body = await self.body(request)
        if body["name"].endswith(".txt"):
            return JSONResponse({"error": {"message": f"{body['name']} cannot be the prompt"}}, 422)
        pixels = Image.open(io.BytesIO(base64.b64decode(body["file_b64"]))).convert("RGB").tobytes()
        return JSONResponse({"bytes_b64": base64.b64encode(pixels).decode(), "bytes": len(pixels)})

    async def decode(self, request: Request) -> Response:
        pixels = base64.b64decode((await self.body(request))["bytes_b64"]).ljust(3 * SIDE**2, b"\0")
        file = io.BytesIO()
        Image.frombytes("RGB", (SIDE, SIDE), pixels).save(file, "PNG")
        return Response(file.getvalue(), media_type="image/png")


@contextlib.contextmanager
def served(loop: Loop, app: Any) -> Iterator[str]:
    """The address of an application that is served."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1))
        running = asyncio.run_coroutine_threadsafe(server.serve([listener]), loop.loop)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        server.should_exit = True
        running.result(60)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    loop = Loop()
    with browser(loop, tmp_path_factory.mktemp("chromium")) as found:
        yield found
    loop.close()


@pytest.fixture
def api() -> Api:
    return Api()


@pytest.fixture
def tab(chromium: Browser, api: Api) -> Iterator[Page]:
    """The page, opened. Whatever a test does, the console stays empty, and no other origin is asked."""
    with served(chromium.loop, api.app) as url:
        tab = chromium.open(url)
        tab.until("document.querySelector('.column .next button:not([hidden])')")
        yield tab
        assert tab.console == []
        assert [one for one in tab.requests if not one.startswith((url, f"blob:{url}", "data:"))] == []
        tab.close()


def eventually(holds: Callable[[], bool]) -> bool:
    """Whether something becomes true."""
    end = time.monotonic() + PATIENCE
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    return holds()


COUNT = "document.querySelectorAll('{}').length"


def patches(tab: Page) -> list[str]:
    """The text of each patch."""
    glyphs = "[...group.querySelectorAll('b')].map(b => b.textContent).join('')"
    return tab.run(f"[...document.querySelectorAll('.view .patch')].map(group => {glyphs})")


def bars(tab: Page, selector: str = ".view i") -> list[float]:
    """The heights of the bars."""
    height = "Number(i.style.getPropertyValue('--height'))"
    return tab.run(f"[...document.querySelectorAll('{selector}')].map(i => {height})")


def write(tab: Page, text: str) -> None:
    """Write the input, and wait until it is read."""
    tab.run("document.getElementById('text').select()")
    tab.type(text)
    shown = len(text)
    tab.until(f"[...document.querySelectorAll('.view')].every(v => v.querySelectorAll('.cell').length === {shown})")


DROP = """(() => {
  const data = new DataTransfer();
  data.items.add(new File([Uint8Array.from(atob("%s"), c => c.charCodeAt(0))], "%s"));
  for (const kind of ["dragover", "drop"])
    document.body.dispatchEvent(new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true}));
})()"""


def drop(tab: Page, name: str, data: bytes) -> None:
    tab.run(DROP % (base64.b64encode(data).decode(), name))


def test_the_page_holds_all_it_needs_and_its_policy_allows_no_more() -> None:
    document = page.document()
    text = document.body.decode()
    assert 'rel="stylesheet"' not in text and " src=" not in text and "@import" not in text and "url(" not in text
    assert "unsafe" not in document.policy and "'none'" in document.policy
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert word not in text
    assert page.document() is document


def test_text_is_cut_into_patches_as_it_is_typed(tab: Page, api: Api) -> None:
    write(tab, "né a\nb")
    assert patches(tab) == ["né", "·a⏎b"]
    assert bars(tab) == [max(0.04, byte % 5 / 8) for byte in "né a\nb".encode()]
    bits = sum(byte % 8 for byte in "né a\nb".encode())
    assert tab.text(".summary") == f"{bits / 7:.2f} bits per byte {bits} bits 2 patches 3.5 bytes per patch "
    assert tab.run("getComputedStyle(document.querySelector('.patch.odd b')).backgroundColor") != tab.run(
        "getComputedStyle(document.querySelector('.patch.even b')).backgroundColor"
    )
    tab.run("document.querySelector('.bars select').selectedIndex = 1")
    tab.run("document.querySelector('.bars select').dispatchEvent(new Event('change'))")
    assert bars(tab) == [max(0.04, min(1, byte % 8 / 8)) for byte in "né a\nb".encode()]
    tab.run("document.querySelector('.view').focus()")
    for key in ("Home", "ArrowRight"):
        tab.press(key)
    told = "é is byte 1 to 2, hex c3 a9 · 4.00 bits · entropy 0.00 bits · patch 1, 3 bytes"
    told += " · expected: e 50\u202f%, \\xe2 25\u202f%"
    assert tab.text(".readout").startswith(told)
    assert tab.run("document.querySelector('.view').ariaValueText").startswith(told)


def test_a_next_byte_is_appended_whatever_it_is(tab: Page, api: Api) -> None:
    write(tab, "a\\")
    tab.click(".next button:nth-child(2)")  # the first byte of a longer character
    tab.until(f"{COUNT.format('.view .cell')} === 3")
    assert tab.run("document.getElementById('text').value") == "a\\\\\\xe2"
    assert data_of(api.asked[-1][1]) == b"a\\\xe2"
    tab.run("document.getElementById('text').focus()")
    tab.type("\\x82\\xac\\r")
    tab.until(f"{COUNT.format('.view .cell')} === 4")
    assert data_of(api.asked[-1][1]) == b"a\\\xe2\x82\xac\r"
    tab.click("#escapes")  # a carriage return would be lost in a text field
    assert tab.run("document.getElementById('escapes').checked")
    tab.click(".next button:nth-child(1)")
    tab.until(f"{COUNT.format('.view .cell')} === 5")
    assert data_of(api.asked[-1][1]) == b"a\\\xe2\x82\xac\re"
    assert tab.run("document.querySelector('.next button:nth-child(4)').disabled")  # the end of the text is no byte
    assert tab.run("document.querySelector('.next button').ariaLabel") == "e, 50\u202f%"


def test_generation_streams_and_can_be_stopped(tab: Page, api: Api) -> None:
    write(tab, "so ")
    api.pause = 0.02
    tab.press("Enter", CONTROL)
    tab.until(f"{COUNT.format('.cell.made')} > 3")
    assert not tab.run("document.getElementById('stopping').disabled")
    tab.press("Escape")
    tab.until("document.querySelector('.ended').textContent")
    assert tab.text(".ended").endswith("bytes generated: stopped")
    tab.until("document.getElementById('stopping').disabled")
    assert eventually(lambda: api.left == 1)
    api.pause = 0
    tab.click("#generate")
    tab.until("document.querySelector('.ended').textContent.startsWith('256')")
    assert api.left == 1
    whole = (STORY * 11)[:256]
    shown = whole.replace(TURNED.encode(), b"\\xe2\\x80\\xae").decode(errors="backslashreplace")
    assert tab.text(".completion") == shown
    assert tab.run(COUNT.format(".completion .code")) == shown.count("\\x") and not tab.run(COUNT.format("b b"))
    assert " bytes/s · first byte after " in tab.text(".speed")
    tab.until(f"{COUNT.format('.patch')} === {(b'so ' + whole).count(b' ') + 1}")
    made = bars(tab, ".made i")
    assert len(made) == 256
    tab.click(".keep")
    tab.until(f"{COUNT.format('.cell:not(.made) i')} === 259")
    assert data_of(api.asked[-1][1]) == b"so " + whole


def test_what_is_chosen_is_sent(tab: Page, api: Api) -> None:
    values = {"temperature": "0.5", "top_p": "0.9", "max_tokens": "3", "seed": "7", "stop": "\\n\\n"}
    for field, value in values.items():
        tab.run(f"document.getElementById('{field}').select()")
        tab.type(value)
    tab.click("#utf8")
    tab.click("#generate")
    tab.until("document.querySelector('.ended').textContent")
    sent = next(body for _, body in api.asked if body.get("stream"))
    chosen = {"temperature": 0.5, "top_p": 0.9, "max_tokens": 3, "seed": 7, "stop": "\n\n", "utf8": True}
    assert sent == chosen | {"stream": True, "model": "cut", "prompt_b64": "", "logprobs": 0}
    tab.run("document.getElementById('top_p').select()")
    tab.type("2")
    tab.click("#generate")
    tab.until("!document.getElementById('problem').hidden")
    assert tab.text("#problem").startswith("Top-p: ")
    assert sum("stream" in body for _, body in api.asked) == 1
    assert tab.run("document.activeElement.id") == "top_p"


def test_two_models_read_the_same_input(tab: Page, api: Api) -> None:
    write(tab, "a b")
    tab.click("#compare")
    tab.until(f"{COUNT.format('.column:nth-child(2) .cell')} === 3")
    write(tab, "a b c")
    tab.until(f"{COUNT.format('.column:nth-child(2) .word .cell')} === 5")  # no patches: words
    assert bars(tab, ".column:nth-child(2) i") == [max(0.04, byte % 8 / 8) for byte in b"a b c"]
    assert tab.run(f"{COUNT.format('.patch')}") == 3
    tab.click("#generate")
    tab.until("[...document.querySelectorAll('.ended')].every(one => one.textContent.startsWith('256 bytes'))")
    assert {body["model"] for _, body in api.asked if body.get("stream")} == {"cut", "plain"}
    made = [max(0.04, min(1, byte % 8 / 8)) for byte in (STORY * 11)[:256]]
    tab.until(f"{COUNT.format('.column:nth-child(2) .made i')} === 256")
    assert bars(tab, ".column:nth-child(2) .made i") == made  # of the stream itself
    tab.click(".column:nth-child(2) .remove")
    assert tab.run(COUNT.format(".column")) == 1


def test_a_dropped_file_is_shown_as_far_as_it_is_read(tab: Page, api: Api) -> None:
    drop(tab, "some.bin", bytes(range(256)) * 40)
    tab.until(f"{COUNT.format('.cell')} > 2000")
    assert tab.text("#about") == "some.bin: the first 2,048 of 10,240 bytes are read"
    assert data_of(api.asked[-1][1]) == bytes(range(256)) * 8
    assert tab.run("document.getElementById('text').value").startswith("\\x00\\x01\\x02")
    drop(tab, "dos.txt", f"ü\r\n{TURNED}".encode())
    tab.until(f"{COUNT.format('.cell')} === 4")
    assert data_of(api.asked[-1][1]) == f"ü\r\n{TURNED}".encode()
    assert tab.run("document.getElementById('text').value") == "ü\\r\n\\xe2\\x80\\xae"
    drop(tab, "text.txt", "üb\n".encode() * 1000)
    tab.until(f"{COUNT.format('.cell')} === 1536")
    assert data_of(api.asked[-1][1]) == "üb\n".encode() * 512
    assert not tab.run("document.getElementById('escapes').checked")


def use(tab: Page, model: str) -> None:
    """Choose a model of the first column."""
    tab.run(f"document.querySelector('.top select').value = '{model}'")
    tab.run("document.querySelector('.top select').dispatchEvent(new Event('change'))")


def test_tokens_are_shown_without_bits_of_bytes(tab: Page, api: Api) -> None:
    use(tab, "pieces")
    api.asked.clear()
    write(tab, "a b")
    tab.until(f"{COUNT.format('.patch')} === 2")
    assert tab.text(".summary") == "2 tokens 1.5 bytes per token " and tab.text(".inside h2") == "Tokens"
    assert tab.run("document.querySelector('.next').hidden")
    tab.click("#generate")
    tab.until("document.querySelector('.ended').textContent")
    scored = [body for path, body in api.asked if path == "/v1/completions" and "logprobs" in body]
    assert scored == [] and tab.text(".completion") == "\\xc8" * 256


def test_half_a_picture_is_completed(tab: Page, api: Api) -> None:
    use(tab, "pictures")
    assert "This model reads image files" in tab.text(".hint")
    file = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), (1, 2, 3)).save(file, "PNG")
    drop(tab, "cat.png", file.getvalue())
    tab.until(f"{COUNT.format('figure img')} === 2 && document.querySelector('.ended').textContent")
    tab.until("[...document.images].every(one => one.complete)")
    sent = next(body for _, body in api.asked if body.get("stream"))
    half = 3 * SIDE**2 // 2
    assert data_of(sent) == b"\1\2\3" * (half // 3) and sent["max_tokens"] == half and sent["ignore_eos"]
    shown = [base64.b64decode(body["bytes_b64"]) for path, body in api.asked if path == "/v1/decode"]
    assert shown[0] == b"\1\2\3" * (SIDE**2) and shown[-1] == data_of(sent) + b"\xc8" * half
    assert tab.run("[...document.images].map(one => one.naturalWidth)") == [SIDE, SIDE]


def test_errors_are_shown_in_a_line(tab: Page, api: Api) -> None:
    shown = "!document.querySelector('.column .error').hidden"
    api.breaks = 5
    tab.click("#generate")
    tab.until(shown)
    assert tab.text(".column .error") == "the sequence failed"
    assert tab.text(".completion") == STORY[:5].decode()  # what came before it stays
    api.breaks, api.fails = 0, (422, "a prompt of 9 bytes is <b>too long</b>")
    tab.click("#generate")
    tab.until("document.querySelector('.column .error').textContent.startsWith('a prompt')")
    assert tab.text(".column .error") == "a prompt of 9 bytes is <b>too long</b>"
    assert tab.run("document.querySelector('.column .error').getClientRects().length") == 1
    api.fails = (429, "the queue is full (128 sequences wait): try again in 1 s")
    tab.run("document.getElementById('text').focus()")
    tab.type("again")
    tab.until("document.querySelector('.column .error').textContent.startsWith('the queue')")
    api.fails = None
    tab.until("document.querySelector('.column .error').hidden")  # asks again by itself
    assert tab.run(COUNT.format(".cell")) == 5
    assert all(line.startswith("Failed to load resource") for line in tab.console), tab.console
    tab.console.clear()


CONTROLS = {"button", "textbox", "combobox", "checkbox", "spinbutton", "slider", "link", "region", "group", "image"}


def test_the_keyboard_is_enough_and_everything_has_a_name(tab: Page, api: Api) -> None:
    tab.type("hi")  # the focus begins in the text
    tab.until(f"{COUNT.format('.cell')} === 2")
    reached = []
    for _ in range(30):
        tab.press("Tab")
        node = "document.activeElement"
        reached.append(tab.run(f"{node}.id || {node}.className || {node}.textContent.trim()"))
        if reached[-1] == "text" or tab.run(f"{node} === document.body"):
            break
        if reached[-1] != "completion":
            assert tab.run(f"getComputedStyle({node}).outlineStyle") != "none", reached
    names = ["escapes", "choose", "clear", "temperature", "top_p", "max_tokens", "seed", "stop", "utf8", "generate"]
    assert reached[: len(names)] == names and "compare" in reached and "view" in reached
    assert reached.index("view") < len(reached) - 3  # then the next bytes
    for _ in range(3):
        tab.run("document.querySelector('.next button').focus()")
        tab.press("Enter")
    tab.until(f"{COUNT.format('.cell')} === 5")
    assert tab.run("document.activeElement.ariaLabel") == "e, 50\u202f%"  # the focus stayed
    api.pause = 0.05
    tab.press("Enter", CONTROL)
    tab.until(f"{COUNT.format('.cell.made')} > 1")
    tab.press("Escape")
    tab.until("document.querySelector('.ended').textContent.endsWith('stopped')")
    tree = tab.send("Accessibility.getFullAXTree")["nodes"]
    found = [(n["role"]["value"], n.get("name", {}).get("value")) for n in tree if not n["ignored"]]
    nameless = [role for role, name in found if role in CONTROLS and not name]
    assert nameless == [] and {"slider", "spinbutton", "combobox", "region"} <= {role for role, _ in found}
    live = [one["value"]["value"] for n in tree for one in n.get("properties", ()) if one["name"] == "live"]
    assert live.count("polite") >= 3


LOOK = """(() => {
  const channels = colour => colour.match(/[\\d.]+/g).map(Number);
  const clear = colour => channels(colour)[3] === 0;
  const light = colour => channels(colour).slice(0, 3).map(v => v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const found = [], width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > width) found.push(`${document.documentElement.scrollWidth} wide`);
  for (const node of document.body.querySelectorAll("*")) {
    const box = node.getBoundingClientRect();
    if (!node.checkVisibility() || box.width < 2) continue;
    if (box.right > width + .5) found.push(`runs over: ${node.className} ${node.textContent.slice(0, 30)}`);
    if (![...node.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || node.disabled) continue;
    let under = node;
    while (under && clear(getComputedStyle(under).backgroundColor)) under = under.parentElement;
    const papers = [under ? getComputedStyle(under).backgroundColor : getComputedStyle(document.body).backgroundColor];
    if (node.closest(".next button")) papers.push(getComputedStyle(document.querySelector(".odd b")).backgroundColor);
    for (const paper of papers) {
      const pair = [light(getComputedStyle(node).color), light(paper)].sort((a, b) => b - a);
      const contrast = (pair[0] + .05) / (pair[1] + .05);
      if (contrast < 4.5) found.push(`faint: ${contrast.toFixed(2)} ${node.className} ${node.textContent}`);
    }
  }
  return found;
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_stands_on_every_width(tab: Page, api: Api, scheme: str) -> None:
    tab.scheme(scheme)
    write(tab, "a long_word_of_more_than_any_line_of_a_telephone_holds_in_one_piece\n\t and \x01 more")
    tab.click("#compare")
    tab.click("#generate")
    tab.until("[...document.querySelectorAll('.ended')].every(one => one.textContent)")
    for width in (390, 800, 1400):
        tab.resize(width)
        assert tab.run(LOOK) == [], width
    paper = "rgb(19, 22, 27)" if scheme == "dark" else "rgb(255, 255, 255)"
    assert tab.run("getComputedStyle(document.body).backgroundColor") == paper

"""A headless Chromium, driven through its DevTools protocol."""

import asyncio
import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One page, in a fresh profile under `folder`. A context manager."""

    def __init__(self, folder, width=1600, height=1000):
        flags = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-features=IsolateSandboxedIframes",  # else the text of a frame is in another process
            "--remote-debugging-port=0", f"--user-data-dir={folder}", f"--window-size={width},{height}",
        ]  # fmt: skip
        self.size = {"width": width, "height": height}
        self.process = subprocess.Popen([CHROMIUM, *flags, "about:blank"], stderr=subprocess.DEVNULL)
        self.loop = asyncio.new_event_loop()
        self.calls = 0
        try:
            port = self._port(Path(folder) / "DevToolsActivePort")
            self.loop.run_until_complete(self._connect(port))
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _port(self, file, timeout=60):
        deadline = time.monotonic() + timeout
        while not file.exists() or not file.read_text().strip():
            assert time.monotonic() < deadline and self.process.poll() is None, "Chromium did not start"
            time.sleep(0.05)
        return int(file.read_text().split()[0])

    async def _connect(self, port):
        self.session = aiohttp.ClientSession()
        async with self.session.get(f"http://127.0.0.1:{port}/json") as response:
            page = next(target for target in await response.json() if target["type"] == "page")
        self.socket = await self.session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0)

    def close(self):
        async def disconnect():
            await self.session.close()

        if hasattr(self, "session"):
            self.loop.run_until_complete(disconnect())
        self.loop.close()
        self.process.terminate()
        self.process.wait(30)

    # ---- what a test does

    def call(self, method, **parameters):
        """A method of the DevTools protocol."""
        return self.loop.run_until_complete(asyncio.wait_for(self._call(method, parameters), 60))

    async def _call(self, method, parameters):
        self.calls += 1
        number = self.calls
        await self.socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = await self.socket.receive_json()
            if message.get("id") == number:
                assert "result" in message, f"{method}: {message}"
                return message["result"]

    def evaluate(self, script, **where):
        """The value of a JavaScript expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, **where)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def before_every_page(self, script):
        self.call("Page.enable")
        self.call("Page.addScriptToEvaluateOnNewDocument", source=script)

    def open(self, url):
        """Goes to an address, also where only its part after # differs."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)

    @property
    def text(self):
        """What the page shows, and the frames in it."""
        tree = self.call("Page.getFrameTree")["frameTree"]
        body = "document.body ? document.body.innerText : ''"
        shown = [self.evaluate(body)]
        for child in tree.get("childFrames", ()):
            with contextlib.suppress(AssertionError):  # it may be loading, or be gone by now
                world = self.call("Page.createIsolatedWorld", frameId=child["frame"]["id"])
                shown.append(self.evaluate(body, contextId=world["executionContextId"]))
        return "\n".join(shown)

    def wait_until(self, true, timeout=60):
        """Waits for a function of this browser to give something true, and gives it back."""
        deadline = time.monotonic() + timeout
        while not (value := true(self)):
            assert time.monotonic() < deadline, f"it never came on this page:\n{self.text}"
            time.sleep(0.2)
        return value

    def wait_for(self, *texts):
        """Waits until the page shows all these texts."""
        for text in texts:
            self.wait_until(lambda browser, text=text: text in browser.text)

    def wait_for_element(self, selector):
        """Waits for a CSS selector, and brings what it selects into view."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.wait_until(lambda browser: browser.evaluate(f"{element} !== null"))
        self.evaluate(f"{element}.scrollIntoView()")

    def screenshot(self, name):
        """Into the folder that SDDIT_SCREENSHOTS names, for a person to look at; without it, none is made."""
        if folder := os.environ.get("SDDIT_SCREENSHOTS"):
            time.sleep(1)  # what moves comes to rest
            Path(folder).mkdir(parents=True, exist_ok=True)
            png = self.call("Page.captureScreenshot")["data"]
            (Path(folder) / f"{name}.png").write_bytes(base64.b64decode(png))

"""The host's page in a Chromium: what a person clicks and types."""

from __future__ import annotations

import json
from typing import Any

from tools.browser import Browser

_HELPERS = """
window.cs = {
  root: () => (typeof gradioApp === 'function' ? gradioApp() : document),
  find: (css) => cs.root().querySelector(css),
  text: (css) => { const e = cs.find(css); return e ? e.innerText : ''; },
  value: (css) => { const e = cs.find(css + ' textarea, ' + css + ' input'); return e && e.value; },
  type: (css, value) => {
    const e = cs.find(css + ' textarea, ' + css + ' input[type=number], ' + css + ' input');
    const kind = e.tagName === 'TEXTAREA' ? HTMLTextAreaElement : HTMLInputElement;
    Object.getOwnPropertyDescriptor(kind.prototype, 'value').set.call(e, value);
    for (const name of ['input', 'change', 'blur'])
      e.dispatchEvent(new Event(name, {bubbles: true}));
    return true;
  },
  click: (css) => {
    const e = cs.find(css);
    (e.tagName === 'BUTTON' ? e : e.querySelector('button') || e).click();
    return true;
  },
  tab: (name) => {
    const all = [...cs.root().querySelectorAll('#tabs > .tab-nav button')];
    const same = (one) => one.textContent.trim().toLowerCase() === name.toLowerCase();
    all.find(same).click();  // some write it with a capital
    return true;
  },
  unfold: (css) => { cs.find(css + ' .label-wrap').click(); return true; },
};
true
"""


class Page:
    """Short names for what the tests do."""

    def __init__(self, browser: Browser, url: str) -> None:
        self.browser, self._url = browser, url

    def open(self) -> None:
        """Open, or open anew, and wait until it can be used."""
        self.browser.open(self._url)
        self._ready()

    def reload(self) -> None:
        """What F5 does."""
        self.browser.run("location.reload()")
        self._ready()

    def _ready(self) -> None:
        ready = "document.readyState === 'complete' && typeof gradioApp === 'function'"
        self.browser.wait_for(
            f"{ready} && !!gradioApp().querySelector('#concept_surgery_train')", 240
        )
        self.browser.run(_HELPERS)

    def tab(self, name: str) -> None:
        self._do("tab", name)

    def click(self, css: str) -> None:
        self._do("click", css)

    def unfold(self, css: str) -> None:
        self._do("unfold", css)

    def type(self, css: str, value: Any) -> None:
        self._do("type", css, str(value))

    def text(self, css: str) -> str:
        return str(self._do("text", css))

    def value(self, css: str) -> str:
        return str(self._do("value", css))

    def wait_for_text(self, css: str, text: str, timeout: float = 900) -> str:
        """What an element says once it has ``text`` in it."""
        call = f"cs.text({json.dumps(css)})"
        self.browser.wait_for(f"{call}.includes({json.dumps(text)})", timeout)
        return self.text(css)

    def choose(self, css: str, option: str) -> None:
        """Choose in a drop-down list by its text."""
        self.browser.run(
            f"(() => {{ const e = cs.find({json.dumps(css)} + ' input'); e.focus(); e.click(); "
            "e.dispatchEvent(new Event('focus')); return true; })()"
        )
        options = "[...cs.root().querySelectorAll('ul[role=listbox] li, ul.options li')]"
        wanted = f"{options}.find((one) => one.textContent.includes({json.dumps(option)}))"
        self.browser.wait_for(f"!!{wanted}", 20)
        self.browser.run(
            f"(() => {{ const e = {wanted}; for (const kind of ['mousedown', 'mouseup', 'click']) "
            "e.dispatchEvent(new MouseEvent(kind, {bubbles: true})); return true; })()"
        )

    def _do(self, name: str, *given: str) -> Any:
        return self.browser.run(f"cs.{name}({', '.join(map(json.dumps, given))})")

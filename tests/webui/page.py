"""A page with the real tab and the real accordion in a real Gradio, around a fake host.

Run as ``python page.py KIND FOLDER`` by a Python that has Gradio; it prints the address. The routes
of the API are added to the same application.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import gradio as gr

ROOT = Path(__file__).resolve().parents[2]


def main(kind: str, folder: str) -> None:
    sys.path.insert(0, str(ROOT))
    from tools.pack import load_pack, use_host

    use_host()
    load_pack()
    sys.path.insert(0, str(ROOT))  # the host has a folder of tests, too
    from tests.webui.conftest import fake_of

    sys.path.remove(str(ROOT))
    hosts = fake_of(kind, Path(folder))
    fake = next(hosts)
    fake.load()
    from concept_surgery.webui import api

    with gr.Blocks(analytics_enabled=False) as demo, gr.Tabs():
        build(fake)
    demo.queue(64)  # as the hosts
    app, url, _ = demo.launch(
        server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, show_api=False
    )
    fake.shared.cmd_opts.api_auth = "me:secret"
    api.on_app_started(demo, app)
    print(url, flush=True)
    threading.Event().wait()


def build(fake) -> None:
    """The tabs of the page."""
    from concept_surgery.webui import tab
    from concept_surgery.webui.accordion import ConceptSurgeryScript

    script = ConceptSurgeryScript()

    def generate(text, names, strength):
        _, done = fake.draw(text, script=script, args=(names, strength))
        return done.info

    with gr.TabItem("txt2img"):
        prompt = gr.Textbox(label="Prompt", elem_id="txt2img_prompt")
        controls = script.ui(False)
        draw = gr.Button("Generate", elem_id="txt2img_generate")
        info = gr.Textbox(label="Info", lines=3, elem_id="info")
        paste = gr.Button("Paste", elem_id="paste")
        draw.click(generate, [prompt, *controls], [info])
        fields = [field for field, _ in script.infotext_fields]
        paste.click(lambda text: filled(script, text), [info], fields)
    for built, title, where in tab.on_ui_tabs():
        with gr.TabItem(title, id=where, elem_id=f"tab_{where}"):
            built.render()


def filled(script, info):
    """As the hosts fill a page in from an info text."""
    line = info.splitlines()[-1]
    params = dict(pair.split(": ", 1) for pair in line.split(", ") if ": " in pair)
    values = []
    for field, read in script.infotext_fields:
        value = read(params)
        if value is None or isinstance(value, type(gr.update())):
            values.append(gr.update() if value is None else value)
        else:
            values.append(gr.update(value=type(field.value)(value)))
    return values


if __name__ == "__main__":
    main(*sys.argv[1:])

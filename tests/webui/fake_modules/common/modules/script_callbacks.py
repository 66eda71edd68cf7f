"""Fake of ``modules.script_callbacks``."""

registered = {}


def _register(kind):
    def on(callback, *, name=None):
        registered.setdefault(kind, []).append(callback)

    return on


on_ui_tabs = _register("ui_tabs")
on_app_started = _register("app_started")
on_ui_settings = _register("ui_settings")
on_script_unloaded = _register("script_unloaded")
on_infotext_pasted = _register("infotext_pasted")

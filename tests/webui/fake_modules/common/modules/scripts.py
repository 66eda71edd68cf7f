"""Fake of ``modules.scripts``."""

AlwaysVisible = object()


class Script:
    """What the hosts' scripts are subclasses of."""

    name = None
    section = None
    filename = None
    alwayson = False
    is_txt2img = is_img2img = False
    infotext_fields = None
    paste_field_names = None
    create_group = True
    sorting_priority = 0

    def elem_id(self, item_id):
        return f"script_{item_id}"

"""Fake of Gradio, for where neither version is installed: components that remember, no page."""

made = []


class Component:
    def __init__(self, *values, **named):
        self.values, self.named, self.events = values, named, []
        self.value = named.get("value", values[0] if values else None)
        made.append(self)

    def click(self, does, inputs=None, outputs=None, **named):
        self.events.append((does, inputs, outputs, named))

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return None


class Update(dict):
    pass


def update(**named):
    return Update(named, __type__="update")


Blocks = Row = Column = Accordion = Textbox = Dropdown = Number = Button = Component
State = HTML = Image = Gallery = Markdown = Slider = Checkbox = Component

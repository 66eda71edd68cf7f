"""Fake of ``modules.prompt_parser``."""

import re


class SdConditioning(list):
    """Prompts with the size of the picture."""

    def __init__(self, prompts, is_negative_prompt=False, width=None, height=None, copy_from=None):
        super().__init__(prompts)
        self.is_negative_prompt, self.width, self.height = is_negative_prompt, width, height


def get_learned_conditioning_prompt_schedules(prompts, base_steps, *rest):
    """[from:to:when] changes while a picture is drawn."""
    found = []
    for prompt in prompts:
        change = re.search(r"\[([^\[\]:]*):([^\[\]:]*):([\d.]+)\]", prompt)
        if change is None:
            found.append([[base_steps, prompt]])
        else:
            parts = [prompt.replace(change[0], change[number]) for number in (1, 2)]
            found.append([[base_steps // 2, parts[0]], [base_steps, parts[1]]])
    return found


def parse_prompt_attention(text):
    """[text, weight] pairs."""
    found = re.fullmatch(r"(.*)(?<!\\)\((.+):([\d.]+)\)(.*)", text)
    if found is None:
        return [[text.replace("\\(", "(").replace("\\)", ")"), 1.0]]
    parts = [[found[1], 1.0], [found[2], float(found[3])], [found[4], 1.0]]
    return [part for part in parts if part[0]]

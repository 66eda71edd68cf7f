"""Erasures that no setting was chosen on: removals, replacements and styles for each model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One erasure, or several in one run.

    Attributes:
        text: as a user types it, a concept a line.
        kind: "object" or "style".
    """

    text: str
    kind: str = "object"

    @property
    def name(self) -> str:
        """One line, for tables."""
        return self.text.replace("\n", ", ")

    @property
    def parts(self) -> tuple[str, str]:
        """The concept and what takes its place, "" for nothing; of a case of one line."""
        concept, _, instead = (part.strip() for part in self.text.partition("=>"))
        return concept, instead

    @property
    def group(self) -> str:
        """What is asked for, in a word for the tables."""
        if "\n" in self.text:
            return "ten together"
        if self.kind == "style":
            return "styles"
        return "replacements" if "=>" in self.text else "removals"


def _removed(*names: str) -> tuple[Case, ...]:
    return tuple(Case(name) for name in names)


def _replaced(*texts: str, kind: str = "object") -> tuple[Case, ...]:
    return tuple(Case(text, kind) for text in texts)


# None of these is on the lists that settings were chosen on (``benchmarks/erasure/cases.TUNED``).
# Half of the replacements have another number of words than what they replace, or other articles.
EMOJI = (
    *_removed("dog", "tiger", "pig", "owl", "whale", "banana", "pizza", "donut", "bicycle"),
    *_removed("cactus", "umbrella", "crown"),
    *_replaced("cat => dog", "rabbit => horse", "pear => cherry", "burger => taco"),
    *_replaced("tulip => rose", "truck => boat"),
    *_replaced("bear => hot dog", "house => light bulb", "guitar => alarm clock"),
    *_replaced("strawberry => apple", "penguin => owl", "tree => umbrella"),
    *_replaced("ink => flat", "flat => cartoon", "cartoon => clay", kind="style"),
    Case("ink", "style"),
)
ICONS = (
    *_removed("hot dog", "police car", "soccer ball", "scissors", "hourglass", "elephant"),
    *_removed("spider", "cheese", "trumpet", "camera", "castle", "ghost"),
    *_replaced("shark => dolphin", "violin => piano", "beer => wine", "key => lock"),
    *_replaced("skull => pumpkin", "shirt => dress"),
    *_replaced("taxi => fire truck", "church => light bulb", "palm tree => clover"),
    *_replaced("ant => top hat", "ice cream => peach", "camel => elephant"),
    *_replaced("pixel => sticker", "midnight => pixel", "sticker => midnight", kind="style"),
    Case("stencil", "style"),
)
# Of the transformer, which isn't measured before its weights are there (``benchmarks/flow``).
FLOW = (
    *_removed("hot dog", "ice cream", "elephant", "snake", "crab", "shark", "spider", "peach"),
    *_removed("corn", "cheese", "lollipop", "wine"),
    *_replaced("camel => sheep", "dolphin => shark", "turtle => crab", "tomato => peach"),
    *_replaced("beer => wine", "lollipop => candy"),
    *_replaced("hot dog => bread", "corn => ice cream", "ant => spider"),
    *_replaced("eggplant => tomato", "rooster => elephant", "scorpion => ant"),
    *_replaced("pixel => sticker", "midnight => pixel", "sticker => midnight", kind="style"),
    Case("stencil", "style"),
)
CASES = {"emoji": EMOJI, "icons": ICONS}
# On the flow model a form can be chosen by these, whose concepts are none of its cases'.
FLOW_TRIED = (
    *_removed("bread", "sheep"),
    *_replaced("candy => lollipop", "bread => cheese", "sheep => camel"),
)

# Removed in one run, and one by one.
_TEN = {
    "emoji": "dog tiger owl whale banana pizza bicycle cactus umbrella crown".split(),
    "icons": [
        *("elephant", "spider", "cheese", "hot dog", "trumpet"),
        *("camera", "castle", "ghost", "scissors", "hourglass"),
    ],
}
TEN = {world: tuple(names) for world, names in _TEN.items()}

# Erased once more with settings that break things, to see whether the report says so.
BROKEN = {
    "emoji": (Case("dog"), Case("bear => hot dog"), Case("ink => flat", "style")),
    "icons": (Case("hot dog"), Case("taxi => fire truck"), Case("pixel => sticker", "style")),
}


def ten_together(world: str) -> Case:
    """The ten removals of a model as one run."""
    return Case("\n".join(TEN[world]))

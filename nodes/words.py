"""What the inputs of all nodes are called, and the words that the nodes are found by."""

from __future__ import annotations

# Inputs that are called otherwise than their names say.
LABELS = {
    "clip": "CLIP",
    "vae": "VAE",
    "cfg": "CFG",
    "filename": "File name",
    "names": "Names in the file",
    "negative": "Negative prompt",
    "negative_prompts": "Negative prompts you use",
    "sampler_name": "Sampler",
    "templates": "Templates (own phrases)",
    "eta": "Eta (push beyond)",
    "protection": "Protection of the rest",
    "drift_weight": "Drift weight (soft form)",
    "keep_weight": "Keep weight (soft form)",
    "null_score": "Null score (soft form)",
    "stop_below": "Stop below (share left)",
    "batch": "Batch (states per step)",
    "trajectories": "Trajectories (sampling runs)",
    "captions": "Captions (language read)",
    "layers": "Layers that train",
    "keep_room": "Room beside kept prompts",
}

# What people type into the search. web/search.js has the same for front ends that get none.
SEARCH_WORDS: dict[str, tuple[str, ...]] = {
    "ConceptSurgeryTrain": (
        "erase",
        "remove",
        "forget",
        "delete",
        "unlearn",
        "censor",
        "LECO",
        "ESD",
        "UCE",
        "erase concept",
        "remove concept",
    ),
    "ConceptSurgerySettings": ("expert settings", "training steps", "rank", "learning rate"),
    "ConceptSurgerySuggest": ("synonyms", "other names", "neighbours", "similar words"),
    "ConceptSurgeryApply": ("apply erasure", "erased model", "patch model", "strength"),
    "ConceptSurgeryReport": ("verdict", "what changes", "erasure statistics"),
    "ConceptSurgeryPurify": ("clean image", "remove from picture", "inversion", "img2img"),
    "ConceptSurgeryCompare": ("before after", "compare", "grid", "xy plot", "test erasure"),
    "ConceptSurgeryJoin": ("merge erasures", "combine erasures", "stack", "several concepts"),
    "ConceptSurgeryTakeOut": ("restore concept", "undo erasure", "split erasure"),
    "ConceptSurgerySave": ("save LoRA", "export erasure"),
    "ConceptSurgeryLoad": ("load LoRA", "open erasure"),
}


def label_of(name: str) -> str:
    """An input's name as people read it."""
    return LABELS.get(name) or name.replace("_", " ").capitalize()

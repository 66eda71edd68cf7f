"""A small text-to-image model that really draws: named objects in named styles, from emoji art.

``python -m benchmarks.emoji.train`` makes it from nothing, ``build.py`` expands the committed
weights to a checkpoint that a stock ComfyUI loads as SD1.5.
"""

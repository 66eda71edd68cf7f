"""Makes the model from nothing: ``python -m benchmarks.emoji.train``.

Each stage goes on where it stopped and is skipped once it is done. Everything lies in
``build/emoji``, with a log for each stage. On two cores it takes several hours; a GPU is used
where there is one.
"""

from __future__ import annotations

import argparse

from benchmarks.emoji import autoencoder, classifier, nothing, text, unet
from benchmarks.emoji.build import CHECKPOINT, trained_parts, write_checkpoint


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8500, help="of the denoiser, in all")
    parser.add_argument("--batch", type=int, default=unet.BATCH)
    parser.add_argument("--rate", type=float, default=unet.RATE)
    parser.add_argument("--cooldown", type=int, default=2500, help="last steps, at a falling rate")
    chosen = parser.parse_args()
    autoencoder.train()
    text.train()
    nothing.train()
    unet.train(chosen.steps, chosen.batch, chosen.rate, chosen.cooldown)
    classifier.train()
    write_checkpoint(CHECKPOINT, *trained_parts())


if __name__ == "__main__":
    main()

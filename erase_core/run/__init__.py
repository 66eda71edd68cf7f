"""One run: states, training and measuring, from settings to artefact."""

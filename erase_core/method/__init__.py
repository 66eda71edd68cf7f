"""The mathematics: guidance, subspace, closed form, protection, and the language they need."""

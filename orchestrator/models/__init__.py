"""The models of a run: which they are, where their files stand, whether they fit each other and the rows; nothing of stages."""

"""Pictures of a run and of patches: hand-written HTML and SVG, one self-contained file, no plotting library."""

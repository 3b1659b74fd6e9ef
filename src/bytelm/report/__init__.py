"""Reports and charts, drawn from the files of a run: Jinja2 templates and SVG, one self-contained page."""

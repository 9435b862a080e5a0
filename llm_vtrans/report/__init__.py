"""The report of a run: one HTML file with inline SVG that opens anywhere, offline."""

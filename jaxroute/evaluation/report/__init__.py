"""An evaluation's files: JSON, CSV, figures, terminal and Markdown tables, and one HTML page."""

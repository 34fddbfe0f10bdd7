"""The report: one self-contained HTML page, and the same figures for papers."""

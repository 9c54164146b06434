"""HTML pages without network access, scripts or other files."""

"""The report: run directories in, one page and its numbers out."""

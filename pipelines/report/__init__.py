"""The report: reads the directories of runs, and makes one page and its numbers."""

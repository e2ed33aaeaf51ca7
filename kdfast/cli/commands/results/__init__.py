"""Commands that show results: pages of files, and figures and tables of papers."""

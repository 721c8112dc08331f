"""Records: what was accepted, how it ended, and who hears of it."""

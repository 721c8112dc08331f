"""Small things that cross threads and loops: a latch, a bounded channel, a loop on a thread, the caller's line."""

"""What crosses HTTP: both wires as tables, and the one codec. Used by client and server alike; it opens no socket."""

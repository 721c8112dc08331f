"""One file per wire: decode, call, encode. What an operation does is not decided here."""

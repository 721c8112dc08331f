"""``python -m tg_tinker.cli``: the same as ``tg-tinker``, by this very Python."""

from __future__ import annotations

from tg_tinker.cli import main

if __name__ == "__main__":
    main(prog_name="tg-tinker")

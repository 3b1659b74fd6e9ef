"""`python -m bytelm`."""

from __future__ import annotations

from bytelm.cli import main

if __name__ == "__main__":
    main()

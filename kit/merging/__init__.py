"""Fold an adapter into its base, and prove that the result is equal to the two.

Called merging so that `kit.merge` is the function, whatever was imported before; for the same reason no module here
bears the name of a function below.
"""

from __future__ import annotations

from kit.merging.fold import merge, peak_rss_gb, verify

__all__ = ["merge", "peak_rss_gb", "verify"]

"""The Triton kernels. In a source folder their files lie in the top-level ``kernels/``; a wheel holds them here.

The top-level folder has no ``__init__.py`` and is never installed under that name: ``kernels`` is the import name of another
package, which transformers uses.
"""

from __future__ import annotations

from pathlib import Path

_root = Path(__file__).resolve().parents[2]
if (_root / "kernels").is_dir() and (_root / "setup.py").is_file() and (_root / "csrc").is_dir():
    __path__.append(str(_root / "kernels"))

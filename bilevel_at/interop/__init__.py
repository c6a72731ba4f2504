"""Other libraries' programs with this library's problems and solvers in them. Each file needs the library it names."""

from __future__ import annotations

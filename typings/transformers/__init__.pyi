# The `__init__` of the package imports every model for a type checker: more than a quarter of the time pyright took.
from typing import Any

def __getattr__(name: str) -> Any: ...

# The package's own `__init__` imports every model for a type checker, which cost pyright a third of its time.
from typing import Any

def __getattr__(name: str) -> Any: ...

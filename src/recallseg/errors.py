"""Every error that RecallSeg raises on purpose: one tree, below :class:`RecallSegError`.

>>> from recallseg import Library, errors
>>> try:
...     Library.open("no such folder")
... except errors.LibraryNotFoundError as error:
...     print(type(error).__module__, isinstance(error, errors.LibraryError))
recallseg.errors True
"""

from recallseg.engines.errors import *  # noqa: F403
from recallseg.engines.errors import __all__ as __all__

"""A library: annotated images, encoded once, found again by similarity.

::

    LIBRARY/
      library.sqlite             the only truth: exemplars, structures, embeddings, tags, digests
      memories/NNNNNN.shard      memory tokens and object pointers, append-only, memory-mapped
      sources/NNNNNN/*.npz       images and masks as they were added, unless told not to keep them
      index/*.usearch            derived; may be deleted at any time
      writer.lock                held by the one process that writes

Where to look: :class:`Library` (``library``) is the door, its methods are thin. ``store`` is the
open folder and the state at which it is seen; ``recalling`` searches and gathers; ``changing`` adds
and removes; ``maintenance`` compacts, encodes anew, verifies; ``calibrations`` keeps what was
learnt; ``binding`` ties a library to its bundle. Below them: ``catalog`` with ``queries``,
``database`` and ``records``, ``shards``, ``sources``, ``retrieval`` with ``index``, ``storage``.
"""

from recallseg.runtime.library.library import Library

__all__ = ["Library"]

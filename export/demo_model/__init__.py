"""Recipe of the demo pair: two small networks of the true architectures, trained here.

``fields``, ``families``, ``rendering`` and ``tasks`` generate what is learnt from;
``segmenter_training`` and ``embedder_training`` learn; ``commands`` runs them. Needs torch,
transformers and numpy; no image from outside ever enters.
"""

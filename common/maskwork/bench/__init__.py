"""What masking costs on this machine: ``maskwork bench``.

Every figure stands beside its floor (the bare AES-CTR keystream of the same length) taken in the same process at the
same moment, since machines are noisy and a ratio says more than seconds. It is NOT a test: nothing passes or fails.
"""
